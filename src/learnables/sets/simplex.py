"""The simplex: weights of an average."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.sets.base import KEPT_NONFINITE, Set, can_look, positive


@final
@dataclass(frozen=True)
class Simplex(Set):
    """Vectors with entries ≥ 0 that sum to ``total``, along the last dimension.

    Entries below a threshold become exactly 0, so the result is sparse; softmax never is.

    Args:
        total: What the entries sum to.

    Raises:
        ConstraintError: ``total`` is not positive.

    Example:
        >>> Simplex().project(torch.tensor([0.5, 2.0, -1.0]))
        tensor([0., 1., 0.])

    Cost:
        A handful of passes: O(n) time each, O(n) memory; a sort where a compiler or an
        accelerator forbids looking at the data. See benchmarks/constraints.py.

    Source:
        Michelot, *A finite algorithm for finding the projection of a point onto the canonical
        simplex of Rⁿ*, doi:10.1007/BF00938486; Condat, *Fast projection onto the simplex and the
        l1 ball*, doi:10.1007/s10107-015-0946-6.
    """

    total: float = 1.0
    measure: ClassVar[str] = "max(|Σx − total|, −min x, 0)"

    def __post_init__(self) -> None:
        positive("total", self.total, "Simplex")

    @property
    def scale(self) -> float:
        """``total``."""
        return self.total

    def nearest(self, x: Tensor) -> Tensor:
        """``max(x − τ, 0)`` with the τ that makes the sum right."""
        with torch.no_grad():
            kept = x - x.amax(-1, keepdim=True) > threshold(x, self.total)
        count = kept.sum(-1, keepdim=True)
        shift = (torch.where(kept, x, 0).sum(-1, keepdim=True) - self.total) / count
        return torch.where(kept, (x - shift).clamp_min(0), 0)

    def outside(self, x: Tensor) -> Tensor:
        """The larger of the error of the sum and the most negative entry."""
        return torch.maximum((x.sum(-1) - self.total).abs(), (-x).amax(-1).clamp_min(0))

    def enforce(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same without what only gradients need."""
        shift = threshold(x, self.total)
        bad = ~shift.isfinite()
        value = (x - x.amax(-1, keepdim=True)).sub_(shift).clamp_min_(0)
        if not (can_look(x) and not bool(bad.any())):
            value = torch.where(bad, x, value)
        return value, bad.squeeze(-1).view(torch.uint8) * KEPT_NONFINITE


def threshold(x: Tensor, total: float) -> Tensor:
    """``τ − max x`` with ``Σ max(x − τ, 0) = total``; shape ``(..., 1)``, NaN where x is."""
    largest = x.amax(-1, keepdim=True)
    x = x - largest  # sums of what is kept are then of the size of `total`
    if not can_look(x):
        return _threshold_by_sorting(x, total)
    # f(τ) = Σ max(x − τ, 0) − total is convex and falls; from a τ with f(τ) ≥ 0 Newton's steps
    # only climb, and end after finitely many because each one drops entries or is the last.
    # Comparisons that make floats are several times faster than those that make booleans.
    shift, before = torch.full_like(largest, -total), -1.0
    over, positive = torch.empty_like(x), torch.empty_like(x)
    while True:
        torch.sub(x, shift, out=over).clamp_min_(0)
        count = torch.gt(over, 0, out=positive).sum(-1, keepdim=True)
        # Rounding may say that f is negative by now; a step down could go round in circles.
        shift += ((over.sum(-1, keepdim=True) - total) / count).clamp_min_(0)
        remaining = float(count.sum(dtype=torch.float64))
        if remaining == before:
            return shift
        before = remaining


def _threshold_by_sorting(x: Tensor, total: float) -> Tensor:
    u = x.sort(dim=-1, descending=True).values
    excess = u.cumsum(-1) - total
    rank = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    count = (u * rank > excess).sum(-1, keepdim=True).clamp_min(1)
    return excess.gather(-1, count - 1) / count
