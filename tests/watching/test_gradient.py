"""What the check between looks sees, with the native kernel and without."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learnables.stats import FORCE
from learnables.watching.gradient import squares_and_faults

VALUES = st.lists(
    st.lists(st.floats(width=32, allow_subnormal=False), max_size=5), min_size=1, max_size=4
)


@pytest.mark.parametrize("forced", ["", "torch"])
@given(values=VALUES)
def test_squares_and_faults_are_those_of_a_loop(forced, values):
    tensors = [torch.tensor(v) for v in values]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FORCE, forced)
        (square, faults), (again, same) = squares_and_faults(tensors, tensors[::-1])
    assert same == [len(tensors) - 1 - i for i in reversed(faults)]
    assert float(again) == pytest.approx(float(square), rel=1e-6, nan_ok=True)
    wanted = [i for i, v in enumerate(values) if not all(map(math.isfinite, v))]
    largest = max((abs(x) for v in values for x in v if math.isfinite(x)), default=0)
    if largest < 1e18 or not forced:  # beyond, torch's norm in float32 may overflow
        assert faults == wanted
    assert math.isfinite(square) == (not faults)
    if not wanted and largest < 1e18:
        assert float(square) == pytest.approx(sum(x * x for v in values for x in v), rel=1e-5)


@pytest.mark.parametrize("forced", ["", "torch"])
def test_no_tensor_is_no_fault(forced, monkeypatch):
    monkeypatch.setenv(FORCE, forced)
    ((square, faults),) = squares_and_faults([])
    assert (square.item(), faults) == (0.0, [])


@pytest.mark.parametrize("forced", ["", "torch"])
def test_large_sparse_and_complex_tensors_are_looked_at_too(forced, monkeypatch):
    monkeypatch.setenv(FORCE, forced)
    bad = torch.ones(1 << 20)
    bad[77] = math.inf
    sparse = torch.sparse_coo_tensor([[1, 3]], [1.0, math.nan], (5,), check_invariants=True)
    complex_ = torch.tensor([1 + 2j, complex(0, math.nan)])
    tensors = [torch.ones(3), bad, sparse, complex_, torch.ones(())]
    _, (square, faults) = squares_and_faults([], tensors)
    assert faults == [1, 2, 3]
    assert not square.isfinite()
