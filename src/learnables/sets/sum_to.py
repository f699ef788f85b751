"""Vectors with a given sum."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.errors import ConstraintError
from learnables.sets.base import Set


@final
@dataclass(frozen=True)
class SumTo(Set):
    """Vectors whose entries, of either sign, sum to ``total`` along the last dimension.

    Args:
        total: The sum.

    Raises:
        ConstraintError: ``total`` is not finite.

    Example:
        >>> SumTo(1.0).project(torch.tensor([1.0, 2.0]))
        tensor([0., 1.])

    Cost:
        Two passes.
    """

    total: float = 1.0
    measure: ClassVar[str] = "|Σx − total|"

    def __post_init__(self) -> None:
        if not math.isfinite(self.total):
            raise ConstraintError(
                "SumTo needs a finite total", found=f"total={self.total}", wanted="a number"
            )

    @property
    def scale(self) -> float:
        """``|total|``, and at least 1: the entries may be much larger than their sum."""
        return max(1.0, abs(self.total))

    def floor(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """Rounding errors of n entries of size 1 add up like √n."""
        return self.scale * math.sqrt(shape[-1]) * torch.finfo(dtype).eps / 2

    def nearest(self, x: Tensor) -> Tensor:
        """``x − (Σx − total) / n``."""
        return x - (x.sum(-1, keepdim=True) - self.total) / x.shape[-1]

    def outside(self, x: Tensor) -> Tensor:
        """``|Σx − total|``."""
        return (x.sum(-1) - self.total).abs()

    def tangent(self, x: Tensor, gradient: Tensor) -> Tensor:
        """``g − mean g``."""
        return gradient - gradient.mean(-1, keepdim=True)
