"""Initialisers that draw each entry independently."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from learnables.init.base import Initializer


@final
@dataclass(frozen=True, repr=True)
class trunc_normal(Initializer):  # noqa: N801 - reads as torch's function of the same name
    """Normal with standard deviation ``std``, cut off at ``mean ± cut · std``.

    Args:
        target: Standard deviation before the cut.
        mean: Centre.
        cut: Where the tails end, in standard deviations.
    """

    target: float = 0.02
    mean: float = 0.0
    cut: float = 2.0

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place."""
        low, high = self.mean - self.cut * self.target, self.mean + self.cut * self.target
        nn.init.trunc_normal_(x, self.mean, self.target, low, high, generator=generator)

    def std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """What is left of ``target`` after the cut is close to it for ``cut`` ≥ 2."""
        return self.target
