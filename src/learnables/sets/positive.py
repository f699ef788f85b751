"""Numbers that stay clear of 0."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from learnables.sets.base import Set, positive


@final
@dataclass(frozen=True)
class Positive(Set):
    """Numbers ≥ ``minimum`` > 0, entry by entry: safe to divide by and to take logarithms of.

    Args:
        minimum: The smallest value; the open set "> 0" has no nearest point.

    Raises:
        ConstraintError: ``minimum`` is not positive.

    Example:
        >>> Positive(0.1).project(torch.tensor([-1.0, 0.5]))
        tensor([0.1000, 0.5000])

    Cost:
        One pass.
    """

    minimum: float = 1e-6
    point_ndim: ClassVar[int] = 0
    measure: ClassVar[str] = "max(minimum − x, 0)"

    def __post_init__(self) -> None:
        positive("minimum", self.minimum, "Positive")

    @property
    def scale(self) -> float:
        """``minimum``."""
        return self.minimum

    def nearest(self, x: Tensor) -> Tensor:
        """``max(x, minimum)``."""
        return x.clamp_min(self.minimum)

    def outside(self, x: Tensor) -> Tensor:
        """``max(minimum − x, 0)``."""
        return (self.minimum - x).clamp_min(0)
