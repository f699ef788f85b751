"""The simplex: weights of an average."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.sets.base import Set, positive


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
            kept = support(x, self.total)
        count = kept.sum(-1, keepdim=True)
        shift = (torch.where(kept, x, 0).sum(-1, keepdim=True) - self.total) / count
        return torch.where(kept, (x - shift).clamp_min(0), 0)

    def outside(self, x: Tensor) -> Tensor:
        """The larger of the error of the sum and the most negative entry."""
        return torch.maximum((x.sum(-1) - self.total).abs(), (-x).amax(-1).clamp_min(0))


def support(x: Tensor, total: float) -> Tensor:
    """Which entries stay positive in the projection onto the simplex, as booleans."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return _support_by_sorting(x, total)
    # f(τ) = Σ max(x − τ, 0) − total is convex and falls; from a τ with f(τ) ≥ 0 Newton's steps
    # only climb, and end after finitely many because each one drops entries or is the last.
    largest = x.amax(-1, keepdim=True)
    x = x - largest  # sums of what is kept are then of the size of `total`
    threshold = torch.full_like(largest, -total)
    before = -1
    while True:
        kept = x > threshold
        count = kept.sum(-1, keepdim=True)
        remaining = int(count.sum())
        if remaining == before or remaining == 0:
            return kept
        before = remaining
        climbed = (torch.where(kept, x, 0).sum(-1, keepdim=True) - total) / count.clamp_min(1)
        threshold = torch.maximum(threshold, climbed)


def _support_by_sorting(x: Tensor, total: float) -> Tensor:
    u = x.sort(dim=-1, descending=True).values
    u = u - u[..., :1]
    excess = u.cumsum(-1) - total
    rank = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    count = (u * rank > excess).sum(-1, keepdim=True).clamp_min(1)
    shift = excess.gather(-1, count - 1) / count
    return x - x.amax(-1, keepdim=True) > shift
