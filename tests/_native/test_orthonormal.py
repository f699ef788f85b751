"""The C kernel against its twin in torch: any shape, any step, any instruction set."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from learnables import sets
from learnables._native import orthonormal as native
from learnables.sets import polar

built = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])
LEVELS = [native.BASELINE, native.AVX2, native.AVX512, native.AVX512_BF16]


def _near(*shape: int, size: float) -> Tensor:
    """Orthonormal matrices after a random step of spectral norm ``size``."""
    w = sets.Orthogonal().project(torch.randn(*shape, dtype=torch.float64)).float()
    step = torch.randn(*shape)
    return w + size * step / torch.linalg.matrix_norm(step, 2)[..., None, None]


def _run_(xs: list[Tensor], level: int = native.AVX512_BF16, threads: int = 1) -> Tensor:
    side = min(xs[0].shape[-2:])
    goal, attainable = (f(side, torch.float32) for f in (polar.promised, polar.reach))
    return native.run_(xs, near=0.9, attainable=attainable, goal=goal, threads=threads, level=level)


def _defect(x: Tensor) -> float:
    return float(polar.defect(x.double()).max())


@built
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 150),
    k=st.integers(1, 150),
    size=st.sampled_from([0.0, 1e-4, 1e-3, 1e-2, 5e-2]),
    seed=st.integers(0, 2**16),
)
def test_every_instruction_set_lands_where_the_twin_lands(level, n, k, size, seed) -> None:
    torch.manual_seed(seed)
    x = _near(2, n, k, size=size)
    value = x.clone()
    assert _run_([value], level).tolist() == [0, 0]
    wanted, _ = polar._seen(x, None)
    torch.testing.assert_close(value, wanted, rtol=0, atol=2e-6)
    assert _defect(value) <= 1e-5


@built
@pytest.mark.parametrize("shape", [(512, 512), (1024, 96), (96, 1024), (513, 130)])
def test_large_matrices_land_on_the_nearest_more_exactly_than_the_dtype_sums(shape) -> None:
    torch.manual_seed(0)
    x = _near(*shape, size=1e-2)
    value = x.clone()
    assert _run_([value]).tolist() == [0]
    torch.testing.assert_close(value, sets.Orthogonal().project(x), rtol=0, atol=1e-6)
    assert _defect(value) <= 1e-5
    again = value.clone()
    _run_([again])
    assert _defect(again) <= 2e-6  # what sums of 512 terms in fp32 miss three times


@built
@pytest.mark.parametrize("level", LEVELS)
def test_what_rounding_does_to_the_square_is_counted(level: int) -> None:
    torch.manual_seed(0)
    x = _near(64, 64, size=0.0)  # all λ alike: nothing but the rounding of λ² is left
    values = [(1 + size) * x for size in torch.linspace(8e-3, 1.1e-2, 40)]
    _run_(values, level)
    assert max(map(_defect, values)) <= 1e-5


@built
def test_what_it_cannot_bring_is_left_bit_by_bit_and_said() -> None:
    torch.manual_seed(0)
    xs = [_near(2, 9, 7, size=1e-2), _near(9, 7, size=1e-2), torch.randn(9, 7)]
    xs[0][1, 3, 3] = torch.nan
    xs[1][8, 6] = torch.inf
    before = [x.clone() for x in xs]
    assert _run_(xs).tolist() == [0, 1, 1, native.FAR]
    assert _defect(xs[0][0]) <= 1e-5
    torch.testing.assert_close(xs[0][1], before[0][1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(xs[1:], before[1:], rtol=0, atol=0, equal_nan=True)


@built
def test_far_matrices_get_a_decomposition_and_the_others_do_not_wait_for_it() -> None:
    torch.manual_seed(0)
    xs = [_near(8, 8, size=1e-2), 3 * torch.randn(8, 8), torch.ones(8, 8), _near(8, 8, size=1e-2)]
    before = [x.clone() for x in xs]
    status = polar.orthonormalise_(xs)
    assert status is not None
    assert status.tolist() == [0, 0, 2, 0]
    assert torch.equal(xs[2], before[2])
    for i in (0, 1, 3):
        torch.testing.assert_close(xs[i], sets.Orthogonal().project(before[i]), rtol=0, atol=2e-5)


@built
@pytest.mark.parametrize("threads", [2, 3, 64])
def test_number_of_threads_changes_no_bit(threads: int) -> None:
    torch.manual_seed(0)
    xs = [_near(33, 20, size=1e-2) for _ in range(17)]
    one, many = ([x.clone() for x in xs] for _ in range(2))
    _run_(one)
    _run_(many, threads=threads)
    assert all(map(torch.equal, one, many))


@built
def test_autograd_is_told_that_the_values_changed() -> None:
    w = nn.Parameter(_near(4, 4, size=1e-2))
    loss = (w * w).sum()
    with torch.no_grad():
        _run_([w])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@built
def test_only_the_rows_and_columns_of_the_matrix_are_written() -> None:
    torch.manual_seed(0)
    for shape in ((5, 3), (3, 5), (70, 33), (33, 70)):
        room = torch.full((shape[0] * shape[1] + 64,), 7.0)
        inside = room[32:-32].view(shape)
        inside.copy_(_near(*shape, size=1e-2))
        _run_([inside])
        assert (room[:32] == 7).all()
        assert (room[-32:] == 7).all()


@built
def test_a_child_made_by_fork_can_call_it_too() -> None:
    code = (
        "import os, torch\n"
        "torch.set_num_threads(1)\n"  # torch's own threads do not live through a fork
        "from learnables._native import orthonormal as s\n"
        "assert s.available()[0]\n"
        "def call():\n"
        "    x = torch.eye(40).repeat(8, 1, 1) + 1e-3\n"
        "    s.run_([x], near=0.9, attainable=3e-6, goal=1e-5, threads=2)\n"
        "    return float((x.mT @ x - torch.eye(40)).abs().max()) < 1e-5\n"
        "assert call()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(0 if call() else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    words = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.run(words, check=False, timeout=60).returncode == 0


def test_without_the_kernel_the_twin_does_it(monkeypatch) -> None:
    torch.manual_seed(0)
    x = _near(3, 12, 5, size=1e-2)
    monkeypatch.setattr(native, "available", lambda: (False, "not built"))
    assert polar.orthonormalise_([x]) is None
    value, status = sets.Orthogonal().enforce(x)
    assert _defect(value) <= 1e-5
    assert status.tolist() == [0, 0, 0]


@built
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 150), k=st.integers(1, 150), seed=st.integers(0, 2**16))
def test_the_tangent_agrees_with_the_twin_on_every_instruction_set(level, n, k, seed) -> None:
    torch.manual_seed(seed)
    x, g = _near(2, n, k, size=0.0), torch.randn(2, n, k)
    wanted, kept = sets.Orthogonal().tangent(x, g), x.clone()
    native.to_tangent_([x[0], x[1]], [g[0], g[1]], threads=1, level=level)
    torch.testing.assert_close(g, wanted, rtol=0, atol=2e-5)
    assert torch.equal(x, kept)
