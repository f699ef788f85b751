"""Matrices with orthonormal columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.errors import ShapeError
from learnables.sets import orthogonal, polar
from learnables.sets.base import Set


@final
@dataclass(frozen=True)
class Stiefel(Set):
    """Matrices with ``WᴴW = I``. Shape ``(..., n, k)`` with ``n ≥ k``; wide ones are refused.

    `Orthogonal` takes both and means the shorter side.

    Example:
        >>> w = Stiefel().project(torch.randn(5, 3))
        >>> torch.allclose(w.mT @ w, torch.eye(3), atol=1e-5)
        True

    Cost:
        That of `Orthogonal`.

    Source:
        Absil, Mahony and Sepulchre, *Optimization algorithms on matrix manifolds*, section 3.3.2.
    """

    point_ndim: ClassVar[int] = 2
    measure: ClassVar[str] = "‖WᵀW − I‖"
    fixes_size: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True
    needs_only_gram: ClassVar[bool] = True
    pads_with_unit: ClassVar[bool] = True

    def check(self, shape: torch.Size) -> None:
        """Refuse a wide matrix.

        Raises:
            ShapeError: More columns than rows.
        """
        if shape[-2] < shape[-1]:
            raise ShapeError(
                "a wide matrix cannot have orthonormal columns",
                found=f"shape {tuple(shape)}: {shape[-2]} rows, {shape[-1]} columns",
                wanted="at least as many rows as columns",
                mend='ln.sets.Orthogonal() for orthonormal rows, or view="cols"',
            )

    def nearest(self, x: Tensor) -> Tensor:
        """``U Vᴴ`` of the singular value decomposition, computed in double precision."""
        return orthogonal.polar_factor(x)

    def outside(self, x: Tensor) -> Tensor:
        """``‖WᴴW − I‖`` (Frobenius)."""
        return polar.defect(x)

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
        """``G − W sym(WᴴG)``."""
        return orthogonal.orthogonal_tangent(x, gradient, total)

    def enforce(self, x: Tensor, total: polar.Total | None = None) -> tuple[Tensor, Tensor]:
        """`polar.orthonormalised` on the batch."""
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
