"""Initialisers that draw each entry independently."""

import math
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
        std: Standard deviation before the cut.
        mean: Centre.
        cut: Where the tails end, in standard deviations.
    """

    std: float = 0.02
    mean: float = 0.0
    cut: float = 2.0

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place."""
        low, high = self.mean - self.cut * self.std, self.mean + self.cut * self.std
        nn.init.trunc_normal_(x, self.mean, self.std, low, high, generator=generator)

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """The standard deviation that the cut leaves: 0.88 ``std`` at ``cut`` = 2."""
        a = self.cut
        density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
        return self.std * math.sqrt(1 - 2 * a * density / math.erf(a / math.sqrt(2)))
