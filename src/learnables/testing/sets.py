"""The laws every set obeys, whatever its points are.

Each law takes a set and a double-precision tensor of shape ``(batch, *point)`` and raises
AssertionError where the set breaks it. They are plain functions: run them under Hypothesis, in a
loop, or all at once with `check_set`.
"""

import math
import pickle
from collections.abc import Sequence

import torch
from torch import Tensor

from learnables.sets.base import Set, length


def _size(of: Set, x: Tensor) -> Tensor:
    """Euclidean norm of each point."""
    if of.point_ndim == 0:
        return x.abs()
    return length(x.flatten(-of.point_ndim))


def _slack(of: Set, x: Tensor) -> float:
    """Rounding in double precision, or what an iterative projection promises."""
    return max(1e-9, of.accuracy) * (of.scale + float(x.abs().max()))


def lands_inside(of: Set, x: Tensor) -> None:
    """The projection lies in the set."""
    assert of.violation(of.project(x)).max() <= _slack(of, x)
    assert of.contains(of.project(x), tol=_slack(of, x)).all()


def projecting_twice_changes_nothing(of: Set, x: Tensor) -> None:
    """A point of the set is its own projection."""
    once = of.project(x)
    torch.testing.assert_close(of.project(once), once, rtol=0, atol=_slack(of, x))


def no_point_of_the_set_is_nearer(of: Set, x: Tensor) -> None:
    """The projection is the *nearest* point, not just some point inside."""
    p = of.project(x)
    ours = _size(of, x - p)
    wide, close = torch.randn_like(x), torch.randn_like(x) * (0.1 * of.scale)
    for guess in (wide, p + close, p + 0.1 * close, x + 0.1 * close):
        theirs = _size(of, x - of.project(guess))
        assert (ours <= theirs + _slack(of, x)).all()


def only_points_inside_have_no_violation(of: Set, x: Tensor) -> None:
    """The violation is 0 exactly where the projection changes nothing."""
    moved = _size(of, x - of.project(x))
    violation = of.violation(x)
    assert (violation >= 0).all()
    assert (moved[violation == 0] <= _slack(of, x)).all()
    assert (violation[moved > math.sqrt(_slack(of, x))] > 0).all()


def a_batch_is_a_stack_of_singles(of: Set, x: Tensor) -> None:
    """Points of one batch do not see each other."""
    singles = [of.project(point) for point in x]
    torch.testing.assert_close(of.project(x), torch.stack(singles), rtol=0, atol=_slack(of, x))


def one_bad_point_spoils_no_other(of: Set, x: Tensor) -> None:
    """A point with NaN in it comes back as it is, and the others as without it."""
    clean = of.project(x)
    bad = x.clone()
    bad[0].view(-1)[0] = math.nan
    dirty = of.project(bad)
    torch.testing.assert_close(dirty[1:], clean[1:], rtol=0, atol=_slack(of, x))
    if of.point_ndim == x.ndim - 1:
        torch.testing.assert_close(dirty[0], bad[0], rtol=0, atol=0, equal_nan=True)
        assert of.violation(bad)[0].isnan().all()
        assert not of.contains(bad)[0].any()


def dtype_and_shape_are_kept(of: Set, x: Tensor) -> None:
    """Every floating dtype comes back as it went in; half precision is computed in fp32."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        given = x.clamp(-1e3, 1e3).to(dtype)
        p = of.project(given)
        assert (p.dtype, p.shape, p.device) == (dtype, given.shape, given.device)
        if dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(p, of.project(given.float()).to(dtype))
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                assert torch.equal(p, of.project(given))


def strides_do_not_matter(of: Set, x: Tensor) -> None:
    """A transposed or sliced tensor is projected like its contiguous copy, and left alone."""
    strided = torch.stack([x, x], dim=-1)[..., 0]
    before = strided.clone()
    torch.testing.assert_close(of.project(strided), of.project(x), rtol=0, atol=_slack(of, x))
    assert torch.equal(strided, before)


def enforcing_is_projecting(of: Set, x: Tensor) -> None:
    """Near the set, the batched call after a step lands where the projection does."""
    inside = of.project(x)
    step = torch.randn_like(x)
    step *= 1e-3 * of.scale / float(_size(of, step).max())
    value, status = of.enforce(inside + step)
    assert status.shape == value.shape[: value.ndim - of.point_ndim]
    assert of.violation(value)[status == 0].max() <= max(1e-5 * of.scale, _slack(of, x))
    wanted = of.project(inside + step)
    torch.testing.assert_close(value, wanted, rtol=0, atol=max(1e-5 * of.scale, _slack(of, x)))


def gradients_are_right(of: Set, x: Tensor) -> None:
    """The gradient of the projection is what finite differences say."""
    assert torch.autograd.gradcheck(
        of.project, x.clone().requires_grad_(), atol=1e-5 + 1e2 * of.accuracy
    )


def it_is_plain_data(of: Set, x: Tensor) -> None:
    """Equal copies come out of a pickle; it is hashable, and prints as the call that made it."""
    again = pickle.loads(pickle.dumps(of))
    assert again == of
    assert hash(again) == hash(of)
    assert repr(of).startswith(type(of).__name__ + "(")


LAWS_OF_SETS = (
    lands_inside,
    projecting_twice_changes_nothing,
    no_point_of_the_set_is_nearer,
    only_points_inside_have_no_violation,
    a_batch_is_a_stack_of_singles,
    one_bad_point_spoils_no_other,
    dtype_and_shape_are_kept,
    strides_do_not_matter,
    enforcing_is_projecting,
    it_is_plain_data,
)


def check_set(
    of: Set,
    shape: Sequence[int] = (4, 6, 6),
    scales: Sequence[float] = (1e-3, 1.0, 1e3),
    seed: int = 0,
) -> None:
    """Hold one set to every law, at each scale; for a test of your own set.

    Args:
        of: The set.
        shape: Shape of the random tensors; a batch, then one point.
        scales: What they are multiplied with.
        seed: Of the random tensors; torch's random state is left as it was.

    Raises:
        AssertionError: The set breaks a law; the traceback names it.

    Example:
        >>> check_set(ln.sets.Simplex(), shape=(3, 5))
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for scale in scales:
            for law in LAWS_OF_SETS:
                law(of, scale * torch.randn(*shape, dtype=torch.float64))
        gradients_are_right(of, torch.randn(*shape, dtype=torch.float64))
