"""Numbers of bounded size."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from learnables.sets.base import Set, positive


@final
@dataclass(frozen=True)
class LinfBall(Set):
    """Numbers with ``|x| ≤ radius``, entry by entry.

    Args:
        radius: Largest absolute value.

    Raises:
        ConstraintError: ``radius`` is not positive.

    Example:
        >>> LinfBall(0.5).project(torch.tensor([-3.0, 0.25]))
        tensor([-0.5000,  0.2500])

    Cost:
        One pass.
    """

    radius: float = 1.0
    point_ndim: ClassVar[int] = 0
    measure: ClassVar[str] = "max(|x| − radius, 0)"

    def __post_init__(self) -> None:
        positive("radius", self.radius, "LinfBall")

    @property
    def scale(self) -> float:
        """``radius``."""
        return self.radius

    def nearest(self, x: Tensor) -> Tensor:
        """``min(max(x, −radius), radius)``."""
        return x.clamp(-self.radius, self.radius)

    def outside(self, x: Tensor) -> Tensor:
        """``max(|x| − radius, 0)``."""
        return (x.abs() - self.radius).clamp_min(0)
