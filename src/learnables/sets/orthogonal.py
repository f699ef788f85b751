"""Matrices with orthonormal columns, or rows where they are wide."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.sets import polar
from learnables.sets.base import Set, computing_dtype
from learnables.sets.spectral import map_singular_values


@final
@dataclass(frozen=True)
class Orthogonal(Set):
    """Matrices with ``WᴴW = I``, or ``WWᴴ = I`` where they are wide. Shape ``(..., n, k)``.

    The nearest one is the polar factor ``W (WᴴW)^(−1/2)``: of all orthogonal matrices the one that
    changes the given value least. `Stiefel` is the same and refuses wide matrices;
    `SpecialOrthogonal` has determinant +1 as well.

    Example:
        >>> w = Orthogonal().project(torch.tensor([[2.0, 0.0], [0.0, -3.0]]))
        >>> w
        tensor([[ 1.,  0.],
                [ 0., -1.]])

    Cost:
        `project`: one SVD in double precision. The call after an optimizer step: 2 or 3 matrix
        products; see benchmarks/constraints.py.

    Source:
        Higham, *Computing the polar decomposition*, doi:10.1137/0907079; the iteration: Björck and
        Bowie, doi:10.1137/0708036.
    """

    point_ndim: ClassVar[int] = 2
    measure: ClassVar[str] = "‖WᵀW − I‖"
    fixes_size: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True
    needs_only_gram: ClassVar[bool] = True
    pads_with_unit: ClassVar[bool] = True

    def nearest(self, x: Tensor) -> Tensor:
        """``U Vᴴ`` of the singular value decomposition, computed in double precision."""
        return polar_factor(x)

    def outside(self, x: Tensor) -> Tensor:
        """``‖WᴴW − I‖`` (Frobenius), by the shorter side."""
        return polar.defect(x)

    def floor(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """What rounding alone does: independent errors in n·k entries."""
        return orthogonality_floor(shape, dtype)

    def tolerance(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """The floor of storage, and what arithmetic can reach."""
        return orthogonality_tolerance(shape, dtype)

    def degenerate(self, x: Tensor) -> Tensor:
        """Where the rank is deficient, so that many orthogonal matrices are nearest."""
        return rank_is_deficient(x)

    def tangent(self, x: Tensor, gradient: Tensor, total: polar.Total | None = None) -> Tensor:
        """``G − W sym(WᴴG)``: two products."""
        return orthogonal_tangent(x, gradient, total)

    def enforce(self, x: Tensor, total: polar.Total | None = None) -> tuple[Tensor, Tensor]:
        """`polar.orthonormalised` on the batch."""
        return enforce_orthogonality(x, total)

    def enforce_(self, xs: Sequence[Tensor]) -> Tensor | None:
        """`polar.orthonormalise_`: each matrix where it lies."""
        return polar.orthonormalise_(xs)

    def to_tangent_(self, xs: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """`polar.to_tangent_`: each gradient where it lies."""
        return polar.to_tangent_(xs, gradients)

    def estimate(
        self, x: Tensor, generator: torch.Generator, total: polar.Total | None = None
    ) -> Tensor:
        """The defect from one random direction, in O(n k)."""
        return estimated_defect(x, generator, total)


def _ones(s: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(s), torch.zeros_like(s)


def polar_factor(x: Tensor, *, rotation: bool = False) -> Tensor:
    """``U Vᴴ``, by double precision; with determinant +1 where ``rotation``."""
    wide = x.to(torch.complex128 if x.is_complex() else torch.float64)
    return map_singular_values(wide, _ones, rotation=rotation).to(x.dtype)


def orthogonality_floor(shape: torch.Size, dtype: torch.dtype) -> float:
    """Defect of an exactly orthogonal matrix after rounding to ``dtype``.

    The relative error of rounding has a root mean square of 0.21 eps; the entries of k unit
    columns pass it on as ``√(2k)`` (1.9e-2 for bf16 and k = 64).
    """
    return 0.215 * torch.finfo(dtype).eps * math.sqrt(2 * min(shape[-2:]))


def orthogonality_tolerance(shape: torch.Size, dtype: torch.dtype) -> float:
    """What storing makes of an orthogonal matrix, twice, and what one call promises."""
    promised = polar.promised(min(shape[-2:]), computing_dtype(dtype))
    return 2 * orthogonality_floor(shape, dtype) + promised


def rank_is_deficient(x: Tensor) -> Tensor:
    """Whether the smallest singular value is lost in rounding beside the largest."""
    s = torch.linalg.svdvals(x.to(torch.complex128 if x.is_complex() else torch.float64))
    eps = torch.finfo(computing_dtype(x.dtype)).eps
    lost: Tensor = s[..., -1] <= s[..., 0] * eps * max(x.shape[-2:])
    return lost


def orthogonal_tangent(x: Tensor, gradient: Tensor, total: polar.Total | None = None) -> Tensor:
    """``G − W sym(WᴴG)``, or ``G − sym(GWᴴ) W`` where wide."""
    if total is not None or x.shape[-2] >= x.shape[-1]:
        inner = x.mH @ gradient
        if total is not None:
            inner = total(inner)
        return _less_half(gradient, x, _with_its_transpose(inner))
    return _less_half(gradient, _with_its_transpose(gradient @ x.mH), x)


def _with_its_transpose(m: Tensor) -> Tensor:
    """``m + mᴴ``; adding what lies across is four times slower than turning it round first."""
    return m.mH.contiguous().add_(m) if m.ndim == 2 else m + m.mH


def _less_half(g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``g − ½ab`` without passes of its own."""
    if g.ndim == 2:
        return torch.addmm(g, a, b, alpha=-0.5)
    return torch.baddbmm(g, a, b, alpha=-0.5) if g.ndim == 3 else g - (a @ b) / 2


def enforce_orthogonality(x: Tensor, total: polar.Total | None = None) -> tuple[Tensor, Tensor]:
    """`polar.orthonormalised` for any number of batch dimensions."""
    flat = x.reshape(-1, *x.shape[-2:])
    value, status = polar.orthonormalised(flat, total)
    return x if value is flat else value.reshape(x.shape), status.reshape(x.shape[:-2])


def estimated_defect(
    x: Tensor, generator: torch.Generator, total: polar.Total | None = None
) -> Tensor:
    """``‖WᴴWv − v‖`` for random signs v; its mean square is the squared defect."""
    tall = total is not None or x.shape[-2] >= x.shape[-1]
    side = x.shape[-1] if tall else x.shape[-2]
    signs = torch.randint(0, 2, (side, 1), generator=generator) * 2 - 1
    v = signs.to(dtype=x.dtype, device=x.device)
    back = x.mH @ (x @ v) if tall else x @ (x.mH @ v)
    if total is not None:
        back = total(back)
    norm: Tensor = torch.linalg.vector_norm(back - v, dim=(-2, -1))
    return norm
