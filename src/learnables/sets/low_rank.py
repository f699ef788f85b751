"""Matrices of bounded rank."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.errors import ConstraintError
from learnables.sets.base import Set, length
from learnables.sets.spectral import map_singular_values


@final
@dataclass(frozen=True)
class LowRank(Set):
    """Matrices of rank ≤ ``rank``. Shape ``(..., n, k)``.

    The parameter keeps its full shape; two thin factors would save memory and change the model.

    Args:
        rank: Largest rank, ≥ 1.

    Raises:
        ConstraintError: ``rank`` is not a positive whole number.

    Example:
        >>> LowRank(1).project(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([[3., 0.],
                [0., 0.]])

    Cost:
        One SVD.

    Source:
        Eckart and Young, *The approximation of one matrix by another of lower rank*,
        doi:10.1007/BF02288367; the tangent: Vandereycken, doi:10.1137/110845768.
    """

    rank: int = 1
    point_ndim: ClassVar[int] = 2
    measure: ClassVar[str] = "(Σ σᵢ², i > rank)^½"
    takes_complex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank >= 1):
            raise ConstraintError(
                "a rank is a positive whole number", found=f"rank={self.rank}", wanted="rank ≥ 1"
            )

    def floor(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """Rounding errors have full rank; they have the size of the matrix's own rounding."""
        return 0.215 * torch.finfo(dtype).eps * math.sqrt(max(shape[-2:]))

    def nearest(self, x: Tensor) -> Tensor:
        """The sum of the ``rank`` largest singular triples."""
        return map_singular_values(x, self._largest)

    def _largest(self, s: Tensor) -> tuple[Tensor, Tensor]:
        kept = (torch.arange(s.shape[-1], device=s.device) < self.rank).to(s.dtype)
        return s * kept, kept.expand(s.shape)

    def outside(self, x: Tensor) -> Tensor:
        """The Euclidean distance: the norm of the singular values that should be 0."""
        s: Tensor = torch.linalg.svdvals(x)[..., self.rank :]
        return length(s)

    def tangent(self, x: Tensor, gradient: Tensor) -> Tensor:
        """``G − (I − UUᴴ) G (I − VVᴴ)``: the new directions on one side at a time."""
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        u, vh = u[..., : self.rank], vh[..., : self.rank, :]
        outside = gradient - u @ (u.mH @ gradient)
        across: Tensor = outside - outside @ vh.mH @ vh
        return gradient - across
