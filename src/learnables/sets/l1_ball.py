"""Vectors with a bounded sum of absolute values."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.sets.base import Set, positive
from learnables.sets.simplex import threshold


@final
@dataclass(frozen=True)
class L1Ball(Set):
    """Vectors with ``Σ|x| ≤ radius``, along the last dimension; the projection is sparse.

    Args:
        radius: Largest sum of absolute values.

    Raises:
        ConstraintError: ``radius`` is not positive.

    Example:
        >>> L1Ball().project(torch.tensor([0.5, -2.0, 0.1]))
        tensor([ 0., -1.,  0.])

    Cost:
        That of `Simplex`.

    Source:
        Duchi and others, *Efficient projections onto the l1-ball for learning in high dimensions*,
        doi:10.1145/1390156.1390191.
    """

    radius: float = 1.0
    measure: ClassVar[str] = "max(Σ|x| − radius, 0)"

    def __post_init__(self) -> None:
        positive("radius", self.radius, "L1Ball")

    @property
    def scale(self) -> float:
        """``radius``."""
        return self.radius

    def nearest(self, x: Tensor) -> Tensor:
        """``sign(x) · max(|x| − τ, 0)``, or ``x`` itself inside."""
        size = x.abs()
        far = size.sum(-1, keepdim=True) > self.radius
        with torch.no_grad():
            kept = size - size.amax(-1, keepdim=True) > threshold(size, self.radius)
        total = torch.where(kept, size, 0).sum(-1, keepdim=True)
        shift = (total - self.radius) / kept.sum(-1, keepdim=True)
        shrunk = torch.where(kept, (size - shift).clamp_min(0), 0) * x.sign()
        return torch.where(far, shrunk, x)

    def outside(self, x: Tensor) -> Tensor:
        """``max(Σ|x| − radius, 0)``."""
        return (x.abs().sum(-1) - self.radius).clamp_min(0)
