import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests._native.block_sparse_cases import check

from learnables import _native
from learnables._native import block_sparse as native
from learnables.errors import LayoutError, LearnablesError
from learnables.sparse import Layout, backend, kernels, random, reference

built = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])

SIZES = [  # out, in, block
    (12, 8, 4),
    (9, 8, (3, 2)),
    (10, 14, 4),
    (130, 200, 64),
    (96, 128, 32),
    (70, 50, 16),
    (300, 330, (150, 300)),
    (64, 64, 8),
]


@built
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("level", [native.BASELINE, native.AVX2, native.AVX512])
def test_every_instruction_set_gives_the_dense_result(size, dtype, level) -> None:
    out, inp, block = size
    p, q = (block, block) if isinstance(block, int) else block
    rows, columns = -(-out // p), -(-inp // q)
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-3}
    for mask in (random(rows, columns, 0.5), torch.zeros(rows, columns), torch.ones(rows, columns)):
        layout = Layout(out, inp, block, mask)
        weight, index = torch.randn(layout.weight_shape, dtype=dtype), layout.index
        bias = torch.randn(out, dtype=dtype)
        for samples in (0, 1, 2, 3, 4, 7, 29, 600):
            x = torch.randn(samples, inp, dtype=dtype)
            g = torch.randn(samples, out, dtype=dtype)
            pairs = [
                (
                    native.product(x, weight, index, b, out, level),
                    reference.product(x, weight, index, out, b, way="filled in"),
                )
                for b in (bias, None)
            ]
            pairs.append(
                (
                    native.transposed_product(g, weight, index, inp, level),
                    reference.transposed_product(g, weight, index, inp, way="filled in"),
                )
            )
            pairs.append(
                (
                    native.sampled_product(g, x, index, (p, q), level),
                    reference.sampled_product(g, x, index, (p, q), way="filled in"),
                )
            )
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, **close)


@built
@pytest.mark.parametrize("size", [*SIZES, (600, 1200, (600, 600))], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level", [native.BASELINE, native.AVX512])
def test_half_precision_adds_up_in_single_and_is_rounded_once(size, dtype, level) -> None:
    out, inp, block = size
    p, q = (block, block) if isinstance(block, int) else block
    rows, columns = -(-out // p), -(-inp // q)
    ulp = torch.finfo(dtype).eps
    for mask in (random(rows, columns, 0.5), torch.zeros(rows, columns), torch.ones(rows, columns)):
        layout = Layout(out, inp, block, mask)
        index, bias = layout.index, torch.randn(out).to(dtype)
        weight = torch.randn(layout.weight_shape).to(dtype)
        for samples in (1, 9, 531):
            x, g = torch.randn(samples, inp).to(dtype), torch.randn(samples, out).to(dtype)
            wide = [t.double() for t in (x, weight, g, bias)]
            pairs = (
                (
                    native.product(x, weight, index, bias, out, level),
                    reference.product(*wide[:2], index, out, wide[3], way="filled in"),
                ),
                (
                    native.transposed_product(g, weight, index, inp, level),
                    reference.transposed_product(wide[2], wide[1], index, inp, way="filled in"),
                ),
                (
                    native.sampled_product(g, x, index, (p, q), level),
                    reference.sampled_product(wide[2], wide[0], index, (p, q), way="filled in"),
                ),
            )
            for ours, exact in pairs:
                assert ours.dtype == dtype
                off, most = (
                    (ours.double() - exact).abs(),
                    exact.abs().amax() if exact.numel() else 0,
                )
                assert (off <= 0.51 * ulp * exact.abs() + 1e-5 * most + 1e-6).all()


@built
@given(seed=st.integers(0, 2**32))
def test_any_shape_gives_the_dense_result_and_a_damaged_index_does_no_harm(seed) -> None:
    check(seed)


@built
def test_halves_at_an_odd_address_are_read_too() -> None:
    layout = Layout(32, 32, 16, torch.ones(2, 2))
    weight = torch.randn(layout.weight_shape).bfloat16()
    x = torch.randn(20 * 32 + 1).bfloat16()[1:].view(20, 32)
    ours = native.product(x, weight, layout.index, None, 32)
    assert torch.equal(ours, native.product(x.clone(), weight, layout.index, None, 32))


@built
def test_the_number_of_threads_changes_no_bit(monkeypatch) -> None:
    monkeypatch.setattr(native, "_PER_THREAD", 1)
    layout = Layout(192, 256, 32, random(6, 8, 0.4))
    weight, x, g = torch.randn(layout.weight_shape), torch.randn(1100, 256), torch.randn(1100, 192)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(
            (
                native.product(x, weight, layout.index, None, 192),
                native.transposed_product(g, weight, layout.index, 256),
                native.sampled_product(g, x, layout.index, (32, 32)),
            )
        )
    for one in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, results[0], strict=True))


@built
def test_strided_and_expanded_inputs_are_read_as_they_are_meant() -> None:
    layout = Layout(12, 8, 4, random(3, 2, 0.5))
    weight = torch.randn(*layout.weight_shape[:2], 8)[..., ::2]
    x, g = torch.randn(8, 9).T, torch.randn(1, 12).expand(9, 12)
    ours = native.product(x, weight, layout.index, None, 12)
    torch.testing.assert_close(ours, reference.product(x, weight, layout.index, 12))
    ours = native.sampled_product(g, x, layout.index, (4, 4))
    torch.testing.assert_close(ours, reference.sampled_product(g, x, layout.index, (4, 4)))


@built
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("value", [-1, 10**12])
def test_an_index_out_of_range_is_never_followed(part, value) -> None:
    layout = Layout(64, 64, 16, random(4, 4, 0.5))
    weight, x = torch.randn(layout.weight_shape), torch.randn(5, 64)
    index = layout.index._replace(**{layout.index._fields[part]: layout.index[part].clone()})
    index[part][1] = value
    by_rows = part < 2
    calls = [
        lambda: kernels.transposed_product(x, weight, index, 64),
        lambda: kernels.product(x, weight, index, 64),
        lambda: kernels.sampled_product(x, x, index, (16, 16)),
    ]
    for call in calls if by_rows else calls[:1]:
        with pytest.raises(LayoutError):
            call()
    short = index._replace(**{index._fields[part]: index[part][:-1]})
    assert native.product(x, weight, short, None, 64) is None


def test_the_backend_is_named_with_its_reason_and_logged_once(monkeypatch, caplog) -> None:
    monkeypatch.delenv(kernels.FORCE, raising=False)
    monkeypatch.setattr(native, "available", lambda: (False, "block_sparse.c was not built"))
    kernels._backend.cache_clear()
    with caplog.at_level(logging.INFO, "learnables.sparse"):
        for _ in range(2):
            assert backend() == ("torch", "block_sparse.c was not built")
            assert backend(torch.zeros(1, dtype=torch.int8)) == ("torch", "dtype torch.int8")
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    monkeypatch.setenv(kernels.FORCE, "native")
    with pytest.raises(LearnablesError, match="was not built"):
        backend()
    monkeypatch.setenv(kernels.FORCE, "cuda")
    with pytest.raises(LearnablesError, match="LEARNABLES_SPARSE=cuda"):
        backend()
    monkeypatch.setenv(kernels.FORCE, "torch")
    assert backend().name == "torch"
    kernels._backend.cache_clear()


def test_without_the_kernel_layers_work_and_agree(monkeypatch) -> None:
    layout = Layout(48, 64, 16, random(3, 4, 0.5))
    weight, x = torch.randn(layout.weight_shape), torch.randn(40, 64)
    here = kernels.product(x, weight, layout.index, 48)
    monkeypatch.setattr(_native, "load", lambda name: (None, "no compiler"))
    monkeypatch.setattr(native, "load", lambda name: (None, "no compiler"))
    native.available.cache_clear()
    kernels._backend.cache_clear()
    try:
        assert backend() == ("torch", "no compiler")
        torch.testing.assert_close(kernels.product(x, weight, layout.index, 48), here)
    finally:
        native.available.cache_clear()
        kernels._backend.cache_clear()
