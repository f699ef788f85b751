"""Sets of matrices obey the laws of a projection, at any size and scale."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learnables import sets
from learnables.errors import ConstraintError, ShapeError
from learnables.sets import polar
from learnables.testing.sets import LAWS_OF_SETS, gradients_are_right

RECTANGULAR = [
    sets.Orthogonal(),
    sets.SpectralBall(),
    sets.SpectralBall(2.0),
    sets.SpectralBand(0.8, 1.3),
    sets.LowRank(1),
    sets.LowRank(3),
    sets.Slices(((0, 1, sets.Sphere()),), dim=-2),
]
TALL = [sets.Stiefel()]
SQUARE = [
    sets.SpecialOrthogonal(),
    sets.Symmetric(),
    sets.Skew(),
    sets.PSD(),
    sets.PSD(0.1),
    sets.Correlation(),
    sets.DoublyStochastic(),
    sets.Slices(((0, 1, sets.NonNegative()), (1, 2, sets.Simplex())), dim=-2),
]
sizes = st.tuples(st.integers(2, 3), st.integers(1, 9), st.integers(1, 9))


def _shape(of, size: tuple[int, int, int]) -> tuple[int, int, int]:
    batch, n, k = size
    least = 2 if isinstance(of, sets.Slices) else 1
    n, k = max(n, least), max(k, least)
    if of in SQUARE:
        return batch, n, n
    return (batch, max(n, k), min(n, k)) if of in TALL else (batch, n, k)


@pytest.mark.parametrize("law", LAWS_OF_SETS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("of", [*RECTANGULAR, *TALL, *SQUARE], ids=repr)
@settings(max_examples=8)
@given(size=sizes, scale=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 2**16))
def test_obeys(law, of, size, scale, seed) -> None:
    torch.manual_seed(seed)
    law(of, scale * torch.randn(_shape(of, size), dtype=torch.float64))


@pytest.mark.parametrize("of", [*RECTANGULAR, *TALL, *SQUARE], ids=repr)
@pytest.mark.parametrize("size", [(2, 5, 3), (2, 3, 5), (2, 4, 4)])
def test_gradient(of, size) -> None:
    torch.manual_seed(0)
    gradients_are_right(of, torch.randn(_shape(of, size), dtype=torch.float64))


def _defect(w: Tensor) -> float:
    w = w.to(torch.complex128 if w.is_complex() else torch.float64)
    w = w if w.shape[-2] >= w.shape[-1] else w.mH
    return float(torch.linalg.matrix_norm(w.mH @ w - torch.eye(w.shape[-1])).max())


def _orthogonal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return sets.Orthogonal().project(torch.randn(*shape, dtype=wide)).to(dtype)


def _step(*shape: int, size: float) -> Tensor:
    """A random step of spectral norm ``size``."""
    d = torch.randn(*shape)
    return size * d / torch.linalg.matrix_norm(d, 2)[..., None, None]


@pytest.mark.parametrize("shape", [(6, 64, 64), (3, 96, 20), (3, 20, 96), (1, 1, 1), (2, 1, 7)])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e-2, 0.2, 1.3, 30.0])
def test_one_call_after_a_step_of_any_size_lands_on_the_nearest(shape, size) -> None:
    torch.manual_seed(0)
    w = _orthogonal(*shape) + _step(*shape, size=size)
    value, status = sets.Orthogonal().enforce(w)
    assert status.sum() == 0
    assert _defect(value) <= 1e-5
    # How far rounding in w moves its polar factor: by its smallest singular value.
    smallest = float(torch.linalg.svdvals(w.double()).min())
    wanted = sets.Orthogonal().project(w)
    torch.testing.assert_close(value, wanted, rtol=0, atol=2e-5 + 1e-6 / smallest)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float64])
def test_other_dtypes_reach_their_own_accuracy(dtype) -> None:
    torch.manual_seed(0)
    w = _orthogonal(2, 12, 7, dtype=dtype) + 1e-3 * torch.randn(2, 12, 7).to(dtype)
    value, _ = sets.Orthogonal().enforce(w)
    assert value.dtype == dtype
    assert _defect(value) <= 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(value, sets.Orthogonal().project(w))


def test_a_complex_gradient_is_right() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, dtype=torch.complex128, requires_grad=True)
    for of in (sets.Orthogonal(), sets.SpectralBall(), sets.LowRank(2), sets.Sphere()):
        assert torch.autograd.gradcheck(of.project, x)
    square = torch.randn(2, 3, 3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(sets.PSD().project, square)


@pytest.mark.parametrize("scale", [1.75, 2.3, 40.0])
def test_no_singular_value_is_ever_turned_into_its_negative(scale) -> None:
    torch.manual_seed(0)
    q = _orthogonal(2, 16, 16)
    cubic = scale * q
    for _ in range(30):
        cubic = 1.5 * cubic - 0.5 * cubic @ cubic.mT @ cubic
    assert not torch.allclose(cubic, q, atol=1e-3)  # what a plain iteration makes of it
    for call in (polar._seen, polar._unseen):
        value = scale * q
        for _ in range(12):
            value, _ = call(value, None)
        torch.testing.assert_close(value, q, rtol=0, atol=1e-5)


def test_a_nan_matrix_is_kept_and_the_others_are_projected() -> None:
    torch.manual_seed(0)
    w = _orthogonal(4, 8, 8) + _step(4, 8, 8, size=1e-2)
    w[2, 0, 0] = math.nan
    for call in (polar._seen, polar._unseen):
        value, status = call(w, None)
        assert status.tolist() == [0, 0, 1, 0]
        torch.testing.assert_close(value[2], w[2], rtol=0, atol=0, equal_nan=True)
        assert _defect(value[[0, 1, 3]]) <= 1e-5


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(8, 8), torch.outer(torch.arange(8.0), torch.ones(8)), torch.eye(8)[:, [0] * 8]],
)
def test_a_matrix_of_deficient_rank_is_completed_by_project_and_kept_later(bad) -> None:
    torch.manual_seed(0)
    w = torch.stack([_orthogonal(8, 8), bad])
    assert _defect(sets.Orthogonal().project(w)) <= 1e-5
    assert sets.Orthogonal().degenerate(w).tolist() == [False, True]
    value, status = sets.Orthogonal().enforce(w)
    assert status.tolist() == [0, 2]
    assert torch.equal(value[1], w[1])


@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_steady_state_over_200_steps(size) -> None:
    torch.manual_seed(1)
    for tangent, goal in ((False, 1e-5), (True, 2e-6)):
        w, worst = _orthogonal(1, 64, 64), 0.0
        for _ in range(200):
            g = _step(1, 64, 64, size=size)
            g = sets.Orthogonal().tangent(w, g) if tangent else g
            w, _ = sets.Orthogonal().enforce(w - g)
            worst = max(worst, _defect(w))
        assert worst <= goal


@pytest.mark.parametrize("shape", [(2, 7, 4), (2, 4, 7), (2, 5, 5)])
def test_the_tangent_has_no_part_across_the_set(shape) -> None:
    torch.manual_seed(0)
    w = sets.Orthogonal().project(torch.randn(shape, dtype=torch.float64))
    g = sets.Orthogonal().tangent(w, torch.randn(shape, dtype=torch.float64))
    # Moving along it leaves the set only in second order; projecting it again changes nothing.
    assert polar.defect(w + 1e-6 * g).max() <= 1e-10
    torch.testing.assert_close(sets.Orthogonal().tangent(w, g), g)


class _TwoRanks:
    """Runs one function on two threads that sum their Gram matrices as two ranks would."""

    def __init__(self) -> None:
        self.barrier, self.parts = threading.Barrier(2), [None, None]

    def total(self, rank: int):
        def total(gram: Tensor) -> Tensor:
            self.parts[rank] = gram
            self.barrier.wait(10)
            whole = self.parts[0] + self.parts[1]
            self.barrier.wait(10)
            return whole

        return total

    def run(self, call, parts: list[Tensor]) -> list[Tensor]:
        results = [None, None]

        def work(rank: int) -> None:
            results[rank] = call(parts[rank], self.total(rank))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return results


@pytest.mark.parametrize("call", [polar._seen, polar._unseen, sets.Orthogonal().enforce])
@pytest.mark.parametrize("size", [1e-2, 3.0])
def test_rows_on_two_ranks_give_what_they_give_together(call, size) -> None:
    torch.manual_seed(0)
    x = _orthogonal(3, 7, 4) + _step(3, 7, 4, size=size)
    whole, status = call(x, None)
    (top, status_0), (bottom, status_1) = _TwoRanks().run(call, [x[:, :2], x[:, 2:]])
    torch.testing.assert_close(torch.cat([top, bottom], 1), whole, rtol=0, atol=2e-6)
    assert torch.equal(status_0, status)
    assert torch.equal(status_1, status)


def _dykstra(x: Tensor, projections: list, rounds: int = 3000) -> Tensor:
    """The textbook's way to the nearest point of an intersection."""
    corrections = [torch.zeros_like(x) for _ in projections]
    for _ in range(rounds):
        for i, project in enumerate(projections):
            y = project(x + corrections[i])
            corrections[i] = x + corrections[i] - y
            x = y
    return x


def test_doubly_stochastic_agrees_with_dykstra() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 6, dtype=torch.float64)
    rows = sets.Simplex().nearest
    wanted = _dykstra(x, [rows, lambda x: rows(x.mT).mT])
    torch.testing.assert_close(sets.DoublyStochastic().project(x), wanted, rtol=0, atol=1e-6)


def test_correlation_agrees_with_dykstra() -> None:
    torch.manual_seed(0)
    x = sets.Symmetric().project(torch.randn(3, 6, 6, dtype=torch.float64))

    def ones_on_the_diagonal(x: Tensor) -> Tensor:
        return x - torch.diag_embed(x.diagonal(dim1=-2, dim2=-1) - 1)

    wanted = _dykstra(x, [sets.PSD().nearest, ones_on_the_diagonal])
    torch.testing.assert_close(sets.Correlation().project(x), wanted, rtol=0, atol=1e-5)


def test_the_spectral_ball_divides_nothing_that_is_inside() -> None:
    x = torch.diag(torch.tensor([0.5, 0.01]))
    assert torch.equal(sets.SpectralBall().project(torch.zeros(3, 3)), torch.zeros(3, 3))
    torch.testing.assert_close(sets.SpectralBall().project(x), x)
    assert torch.equal(sets.SpectralBall().enforce(x)[0], x)


def test_the_hot_call_of_a_band_keeps_what_it_cannot_lengthen() -> None:
    x = torch.stack([torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([2.0, 0.0]))])
    value, status = sets.SpectralBand(0.9, 1.1).enforce(x)
    assert status.tolist() == [0, 2]
    torch.testing.assert_close(value[0], torch.diag(torch.tensor([1.1, 1.0])))
    assert torch.equal(value[1], x[1])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: sets.Stiefel().project(torch.randn(2, 3)), ShapeError, "wide matrix"),
        (lambda: sets.Symmetric().project(torch.randn(2, 3)), ShapeError, "is square"),
        (lambda: sets.Orthogonal().project(torch.randn(3)), ShapeError, "at least 2"),
        (lambda: sets.Orthogonal().project(torch.randn(3, 0)), ShapeError, "no empty dimension"),
        (lambda: sets.Orthogonal().project(torch.eye(2).int()), ConstraintError, "dtype int32"),
        (lambda: sets.PSD(-1.0), ConstraintError, "minimum=-1"),
        (lambda: sets.LowRank(0), ConstraintError, "rank=0"),
        (lambda: sets.SpectralBand(1.0, 1.0), ConstraintError, "low < high"),
        (lambda: sets.SpectralBall(0.0), ConstraintError, "radius=0"),
        (
            lambda: sets.Slices(((0, 3, sets.Ball()), (2, 4, sets.Ball()))),
            ConstraintError,
            "start < stop ≤ next start",
        ),
        (
            lambda: sets.Slices(((0, 9, sets.Ball()),)).project(torch.randn(3)),
            ShapeError,
            "at least 9",
        ),
    ],
)
def test_bad_input_is_named(wrong, error, message) -> None:
    with pytest.raises(error, match=message):
        wrong()


@pytest.mark.parametrize(
    ("dtype", "floor"), [(torch.bfloat16, 1.9e-2), (torch.float16, 2.4e-3), (torch.float32, 2.9e-7)]
)
def test_the_floor_of_storage_is_what_rounding_measures(dtype, floor) -> None:
    torch.manual_seed(0)
    stored = _orthogonal(64, 64, dtype=torch.float64).to(dtype)
    said = sets.Orthogonal().floor(stored.shape, dtype)
    assert said == pytest.approx(floor, rel=0.05)
    assert _defect(stored) == pytest.approx(said, rel=0.1)
    assert sets.Orthogonal().contains(stored)


@pytest.mark.parametrize(
    "of", [sets.Orthogonal(), sets.SpecialOrthogonal(), sets.Symmetric(), sets.Skew()], ids=repr
)
def test_the_hot_call_compiles_without_a_graph_break(of) -> None:
    torch.manual_seed(0)
    x = of.project(torch.randn(2, 6, 6)) + _step(2, 6, 6, size=1e-2)
    torch._dynamo.reset()
    value, status = torch.compile(of.enforce, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(value, of.enforce(x)[0], rtol=0, atol=1e-5)
    assert status.sum() == 0


def test_every_set_that_is_offered_is_held_to_the_laws() -> None:
    from tests.sets.test_vectors import SETS

    held = {type(of) for of in (*RECTANGULAR, *TALL, *SQUARE, *SETS)}
    offered = {getattr(sets, name) for name in sets.__all__}
    of_sets = {x for x in offered if isinstance(x, type) and issubclass(x, sets.Set)}
    assert of_sets - {sets.Set} == held
