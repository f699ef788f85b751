"""Vectors with mean 0."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.sets.base import Set


@final
@dataclass(frozen=True)
class ZeroMean(Set):
    """Vectors whose entries have mean 0, along the last dimension: a centred weight.

    Example:
        >>> ZeroMean().project(torch.tensor([1.0, 3.0]))
        tensor([-1.,  1.])

    Cost:
        Two passes.
    """

    measure: ClassVar[str] = "|mean x|"
    takes_complex: ClassVar[bool] = True

    def floor(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """Rounding errors of n entries of size 1 average out like 1/√n."""
        return torch.finfo(dtype).eps / 2 / math.sqrt(shape[-1])

    def nearest(self, x: Tensor) -> Tensor:
        """``x − mean x``."""
        return x - x.mean(-1, keepdim=True)

    def outside(self, x: Tensor) -> Tensor:
        """``|mean x|``."""
        return x.mean(-1).abs()

    def tangent(self, x: Tensor, gradient: Tensor) -> Tensor:
        """``g − mean g``."""
        return gradient - gradient.mean(-1, keepdim=True)
