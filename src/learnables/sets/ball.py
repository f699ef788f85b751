"""Vectors of bounded length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.sets.base import KEPT_NONFINITE, Set, can_look, length, positive
from learnables.sets.sphere import between_


@final
@dataclass(frozen=True)
class Ball(Set):
    """Vectors with ``‖x‖₂ ≤ radius``, along the last dimension: each row of a weight by itself.

    A real ball: what lies inside is left bit by bit as it is. Keras calls it ``MaxNorm``.

    Args:
        radius: Largest length.

    Raises:
        ConstraintError: ``radius`` is not positive.

    Example:
        >>> Ball().project(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])

    Cost:
        Two passes.
    """

    radius: float = 1.0
    measure: ClassVar[str] = "max(‖x‖ − radius, 0)"
    takes_complex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("radius", self.radius, "Ball")

    @property
    def scale(self) -> float:
        """``radius``."""
        return self.radius

    def nearest(self, x: Tensor) -> Tensor:
        """``x · min(1, radius / ‖x‖)``."""
        norm = length(x, keepdim=True)
        far = norm > self.radius
        return torch.where(far, x * (self.radius / torch.where(far, norm, 1)), x)

    def outside(self, x: Tensor) -> Tensor:
        """``max(‖x‖ − radius, 0)``."""
        return (length(x) - self.radius).clamp_min(0)

    def enforce(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two passes."""
        norm = length(x, keepdim=True)
        scale = (self.radius / norm).clamp_max(1)
        if can_look(x) and float(norm.amax()) < math.inf:
            return x * scale, torch.zeros(x.shape[:-1], dtype=torch.uint8)
        finite = norm.isfinite()
        value = x * torch.where(finite, scale, 1)
        return value, (~finite).squeeze(-1).to(torch.uint8) * KEPT_NONFINITE

    def enforce_(self, xs: Sequence[Tensor]) -> Tensor | None:
        """One pass."""
        return between_(xs, 0.0, self.radius)
