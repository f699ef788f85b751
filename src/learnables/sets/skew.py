"""Skew-symmetric matrices: generators of rotations."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.sets.base import Set, need_square


@final
@dataclass(frozen=True)
class Skew(Set):
    """Matrices with ``W = −Wᵀ`` (skew-Hermitian where complex). Shape ``(..., n, n)``.

    Example:
        >>> Skew().project(torch.tensor([[1.0, 2.0], [4.0, 3.0]]))
        tensor([[ 0., -1.],
                [ 1.,  0.]])

    Cost:
        One pass, one transposed read.
    """

    point_ndim: ClassVar[int] = 2
    measure: ClassVar[str] = "‖W + Wᵀ‖ / 2"
    takes_complex: ClassVar[bool] = True

    def check(self, shape: torch.Size) -> None:
        """Refuse what is not square.

        Raises:
            ShapeError: Rows and columns differ in number.
        """
        need_square(shape, "a skew-symmetric matrix")

    def nearest(self, x: Tensor) -> Tensor:
        """``(W − Wᴴ) / 2``."""
        return (x - x.mH) / 2

    def outside(self, x: Tensor) -> Tensor:
        """``‖W + Wᴴ‖ / 2``, the Euclidean distance."""
        norm: Tensor = torch.linalg.matrix_norm(x + x.mH)
        return norm / 2

    def floor(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """0: equal numbers are rounded equally."""
        return 0.0

    def tangent(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The skew part of the gradient."""
        return (gradient - gradient.mH) / 2
