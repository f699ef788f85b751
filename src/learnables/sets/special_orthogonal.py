"""Rotations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.sets import orthogonal, polar
from learnables.sets.base import Set, need_square


@final
@dataclass(frozen=True)
class SpecialOrthogonal(Set):
    """Rotations: square matrices with ``WᵀW = I`` and determinant +1. Shape ``(..., n, n)``.

    A reflection is turned into the nearest rotation by giving up its weakest direction.

    Example:
        >>> SpecialOrthogonal().project(torch.tensor([[3.0, 0.0], [0.0, -1.0]]))
        tensor([[1., 0.],
                [0., 1.]])

    Cost:
        That of `Orthogonal`: a step never crosses from rotations to reflections, so the call after
        it need not look at the determinant.

    Source:
        Kabsch, doi:10.1107/S0567739476001873; Umeyama, doi:10.1109/34.88573.
    """

    point_ndim: ClassVar[int] = 2
    measure: ClassVar[str] = "‖WᵀW − I‖, and at least 2 where det W < 0"
    fixes_size: ClassVar[bool] = True
    needs_only_gram: ClassVar[bool] = True
    pads_with_unit: ClassVar[bool] = True

    def check(self, shape: torch.Size) -> None:
        """Refuse what is not square.

        Raises:
            ShapeError: Rows and columns differ in number.
        """
        need_square(shape, "a rotation")

    def nearest(self, x: Tensor) -> Tensor:
        """``U diag(1, …, 1, det UVᵀ) Vᵀ``, computed in double precision."""
        return orthogonal.polar_factor(x, rotation=True)

    def outside(self, x: Tensor) -> Tensor:
        """The defect; a reflection is at distance 2 from the rotations."""
        defect = polar.defect(x)
        return torch.where(torch.linalg.slogdet(x).sign < 0, defect.clamp_min(2), defect)

    def floor(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """What rounding alone does."""
        return orthogonal.orthogonality_floor(shape, dtype)

    def tolerance(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """The floor of storage, and what arithmetic can reach."""
        return orthogonal.orthogonality_tolerance(shape, dtype)

    def degenerate(self, x: Tensor) -> Tensor:
        """Where the rank is deficient."""
        return orthogonal.rank_is_deficient(x)

    def tangent(self, x: Tensor, gradient: Tensor, total: polar.Total | None = None) -> Tensor:
        """``W skew(WᵀG)``."""
        return orthogonal.orthogonal_tangent(x, gradient, total)

    def enforce(self, x: Tensor, total: polar.Total | None = None) -> tuple[Tensor, Tensor]:
        """`polar.orthonormalised` on the batch; the sign of the determinant stays."""
        return orthogonal.enforce_orthogonality(x, total)

    def enforce_(self, xs: Sequence[Tensor]) -> Tensor | None:
        """`polar.orthonormalise_`: each matrix where it lies."""
        return polar.orthonormalise_(xs)

    def to_tangent_(self, xs: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """`polar.to_tangent_`: each gradient where it lies."""
        return polar.to_tangent_(xs, gradients)

    def estimate(
        self, x: Tensor, generator: torch.Generator, total: polar.Total | None = None
    ) -> Tensor:
        """The defect from one random direction."""
        return orthogonal.estimated_defect(x, generator, total)
