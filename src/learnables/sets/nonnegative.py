"""Numbers that are at least 0."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from learnables.sets.base import Set


@final
@dataclass(frozen=True)
class NonNegative(Set):
    """Numbers ≥ 0, entry by entry.

    Example:
        >>> NonNegative().project(torch.tensor([-1.0, 0.5]))
        tensor([0.0000, 0.5000])

    Cost:
        One pass.
    """

    point_ndim: ClassVar[int] = 0
    measure: ClassVar[str] = "max(−x, 0)"

    def nearest(self, x: Tensor) -> Tensor:
        """``max(x, 0)``."""
        return x.clamp_min(0)

    def outside(self, x: Tensor) -> Tensor:
        """``max(−x, 0)``."""
        return (-x).clamp_min(0)

    def floor(self, shape: object, dtype: object) -> float:
        """0: rounding keeps the sign."""
        return 0.0
