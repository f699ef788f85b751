"""The C kernel against its twins in torch: spheres and balls of rows of any length."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from learnables import sets
from learnables._native import lengths as native

built = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])
LEVELS = [native.BASELINE, native.AVX2, native.AVX512]


@built
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    width=st.integers(1, 200),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_every_instruction_set_agrees_with_the_twin(level, rows, width, scale, seed) -> None:
    torch.manual_seed(seed)
    xs = [scale * torch.randn(count, width) for count in rows]
    for of, low, high in ((sets.Sphere(1.5), 1.5, 1.5), (sets.Ball(1.5), 0.0, 1.5)):
        values = [x.clone() for x in xs]
        codes = native.run_(values, low, high, threads=1, level=level)
        assert codes.tolist() == [0] * sum(rows)
        for x, value in zip(xs, values, strict=True):
            if x.numel():
                torch.testing.assert_close(value, of.enforce(x)[0], rtol=1e-6, atol=1e-6)


@built
def test_bad_rows_are_left_bit_by_bit_and_said() -> None:
    x = torch.tensor([[3.0, 4.0], [math.nan, 1.0], [0.0, -0.0], [math.inf, 1.0], [0.1, 0.0]])
    for of in (sets.Sphere(), sets.Ball()):
        value = x.clone()
        status = of.enforce_([value])
        _, wanted = of.enforce(x)
        assert status is not None
        assert torch.equal(status, wanted)
        torch.testing.assert_close(value[1:4], x[1:4], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(value[0], torch.tensor([0.6, 0.8]))
    assert torch.equal(value[4], x[4])  # short rows lie in the ball


@built
@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e25, 1e37])
def test_lengths_neither_overflow_nor_underflow(size) -> None:
    x = torch.tensor([[3.0, 4.0]]) * size
    assert native.run_([x], 1.0, 1.0, threads=1).tolist() == [0]
    torch.testing.assert_close(x, torch.tensor([[0.6, 0.8]]))


@built
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_number_of_threads_changes_no_bit(threads, monkeypatch) -> None:
    monkeypatch.setattr(native, "_PER_THREAD", 1)
    xs = [torch.randn(rows, 5) for rows in (100, 1, 7, 250)]
    one, many = ([x.clone() for x in xs] for _ in range(2))
    first = native.run_(one, 1.0, 1.0, threads=1)
    assert torch.equal(first, native.run_(many, 1.0, 1.0, threads=threads))
    assert all(map(torch.equal, one, many))


@built
def test_autograd_is_told_that_the_values_changed() -> None:
    w = nn.Parameter(torch.randn(3, 4))
    loss = (w * w).sum()
    with torch.no_grad():
        sets.Sphere().enforce_([w])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_the_kernel_the_twin_does_it(monkeypatch) -> None:
    monkeypatch.setattr(native, "available", lambda: (False, "not built"))
    assert sets.Sphere().enforce_([torch.randn(2, 3)]) is None
