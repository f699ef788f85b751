"""Vectors whose length lies between two bounds."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.errors import ConstraintError
from learnables.sets.base import Set, length
from learnables.sets.sphere import with_unit_length


@final
@dataclass(frozen=True)
class MinMaxNorm(Set):
    """Vectors with ``low ≤ ‖x‖₂ ≤ high``, along the last dimension: a shell.

    Args:
        low: Smallest length.
        high: Largest length.

    Raises:
        ConstraintError: Not ``0 ≤ low < high``.

    Example:
        >>> MinMaxNorm(1, 2).project(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        tensor([[1.2000, 1.6000],
                [0.6000, 0.8000]])

    Cost:
        Three passes. The zero vector has no nearest point; it becomes ``(low, 0, …)``.
    """

    low: float = 0.0
    high: float = 1.0
    measure: ClassVar[str] = "max(low − ‖x‖, ‖x‖ − high, 0)"
    takes_complex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 <= self.low < self.high and math.isfinite(self.high)):
            raise ConstraintError(
                "a shell needs two lengths in order",
                found=f"low={self.low}, high={self.high}",
                wanted="0 ≤ low < high < inf",
            )

    @property
    def scale(self) -> float:
        """``high``."""
        return self.high

    def nearest(self, x: Tensor) -> Tensor:
        """``x`` shortened to ``high``, lengthened to ``low``, or left."""
        norm = length(x.detach(), keepdim=True)
        outside = (norm < self.low) | (norm > self.high)
        return torch.where(outside, with_unit_length(x) * norm.clamp(self.low, self.high), x)

    def outside(self, x: Tensor) -> Tensor:
        """Distance of the length to the nearer bound."""
        norm = length(x)
        return (norm - norm.clamp(self.low, self.high)).abs()
