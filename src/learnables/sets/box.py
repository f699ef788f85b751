"""Numbers between two bounds."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from learnables.errors import ConstraintError
from learnables.sets.base import Set


@final
@dataclass(frozen=True)
class Box(Set):
    """Numbers in ``[low, high]``, entry by entry. Either bound may be infinite.

    Args:
        low: Smallest value.
        high: Largest value.

    Raises:
        ConstraintError: ``low`` is not below ``high``.

    Example:
        >>> Box(-1, 1).project(torch.tensor([-3.0, 0.5, 2.0]))
        tensor([-1.0000,  0.5000,  1.0000])

    Cost:
        One pass.
    """

    low: float = 0.0
    high: float = 1.0
    point_ndim: ClassVar[int] = 0
    measure: ClassVar[str] = "max(low − x, x − high, 0)"

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConstraintError(
                "a box needs its bounds in order",
                found=f"low={self.low}, high={self.high}",
                wanted="low < high",
            )

    @property
    def scale(self) -> float:
        """The larger of the finite bounds."""
        return max((abs(b) for b in (self.low, self.high) if math.isfinite(b)), default=0.0)

    def nearest(self, x: Tensor) -> Tensor:
        """``min(max(x, low), high)``."""
        return x.clamp(self.low, self.high)

    def outside(self, x: Tensor) -> Tensor:
        """Distance to the nearer bound."""
        return (x - x.clamp(self.low, self.high)).abs()
