"""Positive semidefinite matrices: covariances, metrics, kernels."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.errors import ConstraintError
from learnables.sets.base import Set, need_square
from learnables.sets.spectral import map_eigenvalues


@final
@dataclass(frozen=True)
class PSD(Set):
    """Symmetric matrices with all eigenvalues ≥ ``minimum``. Shape ``(..., n, n)``.

    ``PSD()`` allows eigenvalue 0; ``PSD(1e-3)`` is positive definite and safe to invert.

    Args:
        minimum: Smallest eigenvalue, ≥ 0.

    Raises:
        ConstraintError: ``minimum`` is negative or not finite.

    Example:
        >>> PSD().project(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
        tensor([[1., 0.],
                [0., 0.]])

    Cost:
        One symmetric eigendecomposition.

    Source:
        Higham, *Computing a nearest symmetric positive semidefinite matrix*,
        doi:10.1016/0024-3795(88)90223-6.
    """

    minimum: float = 0.0
    point_ndim: ClassVar[int] = 2
    measure: ClassVar[str] = "max(minimum − λ₁, ‖W − Wᵀ‖/2, 0)"
    takes_complex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.minimum >= 0 and math.isfinite(self.minimum)):
            raise ConstraintError(
                "a positive semidefinite matrix has no negative eigenvalue",
                found=f"minimum={self.minimum}",
                wanted="0 ≤ minimum < inf",
            )

    def check(self, shape: torch.Size) -> None:
        """Refuse what is not square.

        Raises:
            ShapeError: Rows and columns differ in number.
        """
        need_square(shape, "a symmetric matrix")

    def nearest(self, x: Tensor) -> Tensor:
        """``V max(Λ, minimum) Vᴴ`` of the symmetric part."""
        value = map_eigenvalues(
            (x + x.mH) / 2,
            lambda s: (s.clamp_min(self.minimum), (s > self.minimum).to(s.dtype)),
        )
        return (value + value.mH) / 2

    def outside(self, x: Tensor) -> Tensor:
        """The larger of the lack of the smallest eigenvalue and the asymmetry."""
        smallest = torch.linalg.eigvalsh((x + x.mH) / 2)[..., 0]
        skew = torch.linalg.matrix_norm(x - x.mH) / 2
        return torch.maximum((self.minimum - smallest).clamp_min(0), skew)

    def tangent(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The symmetric part of the gradient."""
        return (gradient + gradient.mH) / 2
