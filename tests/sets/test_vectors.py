"""Sets of numbers and vectors obey the laws of a projection, at any size and scale."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learnables import sets
from learnables.errors import ConstraintError, ShapeError
from learnables.testing.sets import LAWS_OF_SETS, gradients_are_right

SETS = [
    sets.NonNegative(),
    sets.Positive(0.3),
    sets.Box(-0.5, 2.0),
    sets.Box(-math.inf, 1.0),
    sets.LinfBall(0.7),
    sets.Sphere(),
    sets.Sphere(2.5),
    sets.Ball(),
    sets.Ball(3.0),
    sets.MinMaxNorm(0.5, 2.0),
    sets.L1Ball(),
    sets.L1Ball(2.0),
    sets.Simplex(),
    sets.Simplex(3.0),
    sets.SumTo(2.0),
    sets.ZeroMean(),
    sets.Monotone(),
    sets.Monotone(increasing=False),
]
sizes = st.tuples(st.integers(2, 5), st.integers(1, 33))


@pytest.mark.parametrize("law", LAWS_OF_SETS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("of", SETS, ids=repr)
@settings(max_examples=8)
@given(size=sizes, scale=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 2**16))
def test_obeys(law, of, size, scale, seed) -> None:
    torch.manual_seed(seed)
    law(of, scale * torch.randn(size, dtype=torch.float64))


@pytest.mark.parametrize("of", SETS, ids=repr)
def test_gradient(of) -> None:
    torch.manual_seed(0)
    gradients_are_right(of, torch.randn(3, 7, dtype=torch.float64))


def _clip_and_renormalise(x: Tensor) -> Tensor:
    positive = x.clamp_min(1e-9)
    return positive / positive.sum(-1, keepdim=True)


def test_the_law_of_nearness_rejects_what_only_lands_inside(monkeypatch) -> None:
    from learnables.testing.sets import lands_inside, no_point_of_the_set_is_nearer

    torch.manual_seed(0)
    x = torch.randn(5, 9, dtype=torch.float64)
    monkeypatch.setattr(sets.Simplex, "nearest", lambda _, x: _clip_and_renormalise(x))
    lands_inside(sets.Simplex(), x)
    with pytest.raises(AssertionError):
        no_point_of_the_set_is_nearer(sets.Simplex(), x)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: sets.Simplex(-1.0), "total=-1"),
        (lambda: sets.Sphere(0.0), "radius=0"),
        (lambda: sets.Ball(math.nan), "radius=nan"),
        (lambda: sets.L1Ball(math.inf), "radius=inf"),
        (lambda: sets.Box(1.0, 1.0), "low < high"),
        (lambda: sets.MinMaxNorm(2.0, 1.0), "0 ≤ low < high"),
        (lambda: sets.Positive(0.0), "minimum > 0"),
        (lambda: sets.SumTo(math.inf), "total=inf"),
    ],
)
def test_a_set_without_meaning_is_refused(wrong, message) -> None:
    with pytest.raises(ConstraintError, match=message):
        wrong()


def test_a_number_is_no_vector() -> None:
    with pytest.raises(ShapeError, match="at least 1"):
        sets.Sphere().project(torch.tensor(1.0))
    assert sets.NonNegative().project(torch.tensor(-1.0)) == 0


def test_an_integer_tensor_is_refused() -> None:
    with pytest.raises(ConstraintError, match="dtype int64"):
        sets.NonNegative().project(torch.tensor([1, 2]))


def test_a_complex_tensor_is_taken_where_it_has_a_meaning() -> None:
    x = torch.tensor([[3j, 4.0]])
    torch.testing.assert_close(sets.Sphere().project(x), torch.tensor([[0.6j, 0.8]]))
    with pytest.raises(ConstraintError, match="complex64"):
        sets.Simplex().project(x)


def test_the_ball_leaves_short_rows_alone_and_the_sphere_does_not() -> None:
    w = torch.tensor([[0.02, 0.0], [3.0, 4.0]])
    assert torch.equal(sets.Ball().project(w)[0], w[0])
    torch.testing.assert_close(sets.Sphere().project(w).norm(dim=1), torch.ones(2))


def test_a_zero_row_lands_on_the_sphere_and_is_only_reported_in_the_hot_call() -> None:
    zero = torch.zeros(2, 3)
    torch.testing.assert_close(sets.Sphere(2.0).project(zero).norm(dim=1), torch.full((2,), 2.0))
    value, status = sets.Sphere().enforce(zero)
    assert torch.equal(value, zero)
    assert status.tolist() == [2, 2]


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_sphere_neither_overflows_nor_underflows(size) -> None:
    x = torch.tensor([[3.0, 4.0]]) * size
    torch.testing.assert_close(sets.Sphere().project(x), torch.tensor([[0.6, 0.8]]))


def _simplex_by_sorting(x: Tensor, total: float) -> Tensor:
    """The textbook's algorithm, one row at a time."""
    rows = []
    for row in x:
        u = row.sort(descending=True).values
        k = max(i + 1 for i in range(len(u)) if u[i] + (total - u[: i + 1].sum()) / (i + 1) > 0)
        rows.append((row + (total - u[:k].sum()) / k).clamp_min(0))
    return torch.stack(rows)


@given(size=sizes, scale=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 2**16))
def test_the_simplex_agrees_with_the_textbook_however_it_is_computed(size, scale, seed) -> None:
    from learnables.sets import simplex

    torch.manual_seed(seed)
    x = scale * torch.randn(size, dtype=torch.float64)
    wanted = _simplex_by_sorting(x, 1.0)
    torch.testing.assert_close(sets.Simplex().project(x), wanted, atol=1e-12, rtol=1e-12)
    below = x - x.amax(-1, keepdim=True)
    sorting = simplex._threshold_by_sorting(below, 1.0)
    torch.testing.assert_close(simplex.threshold(x, 1.0), sorting, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sets.Simplex().enforce(x)[0], wanted, atol=1e-12, rtol=1e-12)


def _rising_by_pooling(row: list[float]) -> list[float]:
    """Pool adjacent violators, one at a time."""
    pools: list[list[float]] = []
    for value in row:
        pools.append([value])
        while len(pools) > 1 and sum(pools[-2]) / len(pools[-2]) >= sum(pools[-1]) / len(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return [sum(pool) / len(pool) for pool in pools for _ in pool]


@given(size=sizes, seed=st.integers(0, 2**16))
def test_monotone_agrees_with_pooling_however_it_is_computed(size, seed) -> None:
    from learnables.sets import monotone

    torch.manual_seed(seed)
    x = torch.randn(size, dtype=torch.float64)
    wanted = torch.tensor([_rising_by_pooling(row) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(sets.Monotone().project(x), wanted)
    block = monotone._blocks_by_bounds(x)
    torch.testing.assert_close(monotone._means(x, block).gather(-1, block), wanted)


@pytest.mark.parametrize("of", SETS, ids=repr)
def test_the_hot_call_compiles_without_a_graph_break(of) -> None:
    torch.manual_seed(0)
    x = of.project(torch.randn(3, 6)) + 1e-2 * torch.randn(3, 6)
    torch._dynamo.reset()
    compiled = torch.compile(of.enforce, fullgraph=True, backend="eager")
    value, status = compiled(x)
    torch.testing.assert_close(value, of.enforce(x)[0])
    assert status.sum() == 0
