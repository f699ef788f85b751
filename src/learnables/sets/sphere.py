"""Vectors of one length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables._native import lengths as native
from learnables.sets.base import KEPT_DEGENERATE, KEPT_NONFINITE, Set, can_look, length, positive


@final
@dataclass(frozen=True)
class Sphere(Set):
    """Vectors with ``‖x‖₂ = radius``, along the last dimension: each row of a weight by itself.

    Not the ball: a short vector is lengthened. `Ball` leaves it alone.

    Args:
        radius: The length.

    Raises:
        ConstraintError: ``radius`` is not positive.

    Example:
        >>> Sphere().project(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        tensor([[0.6000, 0.8000],
                [0.6000, 0.8000]])

    Cost:
        Two passes. The zero vector has no nearest point; it becomes ``(radius, 0, …)``.
    """

    radius: float = 1.0
    measure: ClassVar[str] = "|‖x‖ − radius|"
    fixes_size: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("radius", self.radius, "Sphere")

    @property
    def scale(self) -> float:
        """``radius``."""
        return self.radius

    def nearest(self, x: Tensor) -> Tensor:
        """``radius · x / ‖x‖``."""
        direction = with_unit_length(x)
        return direction * self.radius

    def outside(self, x: Tensor) -> Tensor:
        """``|‖x‖ − radius|``."""
        return (length(x) - self.radius).abs()

    def tangent(self, x: Tensor, gradient: Tensor) -> Tensor:
        """``g − x ⟨x, g⟩ / radius²``."""
        along = (
            (x.conj() * gradient).real.sum(-1, keepdim=True)
            if x.is_complex()
            else ((x * gradient).sum(-1, keepdim=True))
        )
        return gradient - x * (along / self.radius**2)

    def degenerate(self, x: Tensor) -> Tensor:
        """The zero vector is equally far from every point."""
        return (x == 0).all(-1)

    def enforce(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two passes; a zero row stays zero and is reported."""
        norm = length(x, keepdim=True)
        scale = self.radius / norm
        if can_look(x):
            low, high = torch.aminmax(norm)
            if float(low) > 0 and float(high) < math.inf:
                return x * scale, torch.zeros(x.shape[:-1], dtype=torch.uint8)
        finite = norm.isfinite()
        value = x * torch.where((norm > 0) & finite, scale, 1)
        status = ~finite * KEPT_NONFINITE + (norm == 0) * KEPT_DEGENERATE
        return value, status.squeeze(-1).to(torch.uint8)

    def enforce_(self, xs: Sequence[Tensor]) -> Tensor | None:
        """One pass; a zero row stays zero and is reported."""
        return between_(xs, self.radius, self.radius)


def between_(xs: Sequence[Tensor], low: float, high: float) -> Tensor | None:
    """Scale the rows of many tensors to lengths from ``low`` to ``high``, in place.

    Returns:
        A status for each row, one tensor after the other; None without the native kernel.
    """
    if not native.available()[0] or not any(x.numel() for x in xs):
        return None
    return native.run_(xs, low, high, threads=torch.get_num_threads())


def with_unit_length(x: Tensor) -> Tensor:
    """``x / ‖x‖`` without overflow or underflow; the first unit vector where ``x`` is zero."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    zero = largest == 0
    safe = x / torch.where(zero, 1, largest)
    norm = length(torch.where(zero, 1, safe), keepdim=True)
    first = torch.zeros_like(x)
    first[..., 0] = 1
    return torch.where(zero, first, safe / norm)
