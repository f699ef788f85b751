"""Tables of sines and cosines: positions that are known before anything is learned."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnables.errors import ShapeError
from learnables.init.base import Initializer


@final
@dataclass(frozen=True, repr=False)
class sincos1d(Initializer):  # noqa: N801 - named as in other libraries
    """Row n is sin(n ω) followed by cos(n ω), ω falling from 1 to nearly 1 / ``temperature``.

    Source:
        Vaswani et al., *Attention Is All You Need*, arXiv:1706.03762, section 3.5 (there the sines
        and cosines alternate).

    Example:
        >>> sincos1d()(torch.empty(1, 2, 2))
        tensor([[[0.0000, 1.0000],
                 [0.8415, 0.5403]]])
    """

    temperature: float = 10000.0
    deterministic = True

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` of shape (…, N, D), D even, in place."""
        n = torch.arange(x.shape[-2], dtype=torch.float64, device=x.device)
        x.copy_(_waves(n, x.shape[-1], self.temperature, x.shape))

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """None: the values are not a sample of anything."""
        return None


@final
@dataclass(frozen=True, repr=False)
class sincos2d(Initializer):  # noqa: N801 - named as in other libraries
    """Half of the features encode the row of a grid, half the column, as `sincos1d` each.

    Args:
        grid: (h, w).
        prefix: Rows in front that stay 0.
        temperature: 1 / the lowest frequency, nearly.

    Source:
        Chen et al., *An Empirical Study of Training Self-Supervised Vision Transformers*,
        arXiv:2104.02057; He et al., *Masked Autoencoders*, arXiv:2111.06377.

    Example:
        >>> sincos2d((2, 2), prefix=1)(torch.empty(1, 5, 4))[0, :, 1]
        tensor([0.0000, 1.0000, 1.0000, 0.5403, 0.5403])
    """

    grid: tuple[int, int]
    prefix: int = 0
    temperature: float = 10000.0
    deterministic = True

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` of shape (…, prefix + h · w, D), D divisible by 4, in place.

        Raises:
            ShapeError: The grid has another number of places.
        """
        height, width = self.grid
        if x.ndim < 2 or x.shape[-2] != self.prefix + height * width:
            raise ShapeError(
                "a sin-cos table has one row for each place of its grid",
                found=f"shape {tuple(x.shape)}",
                wanted=f"(…, {self.prefix + height * width}, D)",
            )
        place = torch.arange(height * width, dtype=torch.float64, device=x.device)
        half = x.shape[-1] // 2
        x.zero_()
        for part, n in ((slice(half), place // width), (slice(half, None), place % width)):
            rows = x[..., self.prefix :, part]
            rows.copy_(_waves(n, half, self.temperature, x.shape))

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """None: the values are not a sample of anything."""
        return None


def _waves(n: Tensor, dim: int, temperature: float, shape: torch.Size) -> Tensor:
    """(N, dim): sines, then cosines, of ``n`` at dim / 2 frequencies.

    Raises:
        ShapeError: ``dim`` is odd.
    """
    if dim % 2:
        raise ShapeError(
            "a sin-cos table has an even number of features for each axis",
            found=f"shape {tuple(shape)}",
            wanted="D divisible by 2, for a grid by 4",
        )
    k = torch.arange(dim // 2, dtype=torch.float64, device=n.device)
    angle = n[:, None] * torch.exp(k * (-2 * math.log(temperature) / dim))
    return torch.cat([angle.sin(), angle.cos()], dim=1)
