"""Rotary positions whose frequencies are learned.

Shapes: B batch, H heads, N tokens, d head dim, h × w grid.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnables.declare import parameter
from learnables.errors import LearnablesError, ShapeError
from learnables.init.base import Init, Initializer
from learnables.nn.component import Component, wide
from learnables.nn.resample import Grid


@final
@dataclass(frozen=True, repr=False)
class rotated_frequencies(Initializer):  # noqa: N801 - named as the initialisers of ln.init
    """Frequencies 1/θ^k along two perpendicular directions, turned by a random angle per head."""

    theta: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.theta < math.inf:
            raise LearnablesError(
                "a base of frequencies is positive", found=f"theta={self.theta}", wanted="theta > 0"
            )

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` of shape (2, H, d/2), d divisible by 4, in place."""
        heads, half = x.shape[1:]
        k = torch.arange(half // 2, dtype=x.dtype, device=x.device)
        size = torch.exp(-k * (2 * math.log(self.theta) / half))
        angle = torch.empty(heads, 1, dtype=x.dtype, device=x.device)
        angle.uniform_(0, 2 * math.pi, generator=generator)
        both = torch.stack([angle, angle + math.pi / 2], dim=1)  # (H, 2, 1)
        x[0] = (both.cos() * size).flatten(1)
        x[1] = (both.sin() * size).flatten(1)

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """None: the frequencies are a ladder, not a sample."""
        return None


@final
class RotaryFrequencies(Component):
    """Queries or keys turned by angles that grow with row and column, at learned frequencies.

    Angles and rotation are computed in fp32. Any grid will do; there is nothing to resample.

    Parameters:
        frequencies (2, H, d/2): 1/θ^k along two perpendicular directions, which are turned by a
            random angle for each head. No decay.

    Args:
        num_heads: H.
        head_dim: d, divisible by 4.
        theta: θ; 10 in the paper.
        init: Another initialiser.

    Raises:
        ShapeError: d is not divisible by 4.

    Source:
        Heo et al., *Rotary Position Embedding for Vision Transformer* (its RoPE-Mixed),
        arXiv:2403.13298.

    Example:
        >>> import learnables as ln
        >>> rotary, q = ln.nn.RotaryFrequencies(4, 8), torch.randn(2, 4, 1 + 6, 8)
        >>> turned = rotary(q, grid=(2, 3), prefix=1)
        >>> torch.allclose(turned.norm(dim=-1), q.norm(dim=-1))
        True
    """

    def __init__(
        self, num_heads: int, head_dim: int, theta: float = 10.0, *, init: Init | None = None
    ) -> None:
        super().__init__()
        if head_dim % 4:
            raise ShapeError(
                "rotary frequencies in two dimensions take features by fours",
                found=f"head_dim={head_dim}",
                wanted="divisible by 4",
            )
        self.frequencies = parameter(
            2,
            num_heads,
            head_dim // 2,
            init=init or rotated_frequencies(theta),
            weight_decay=False,
            tags=("position", "fp32"),
        )

    def forward(self, x: Tensor, grid: Grid, prefix: int = 0) -> Tensor:
        """(B, H, prefix + h · w, d) → the same, each pair of features turned.

        Args:
            x: Queries or keys: prefix tokens, which stay, then the grid row by row.
            grid: (h, w).
            prefix: Number of tokens in front.

        Raises:
            ShapeError: ``x`` does not fill the grid.
        """
        height, width = grid
        if x.shape[2] != prefix + height * width:
            raise ShapeError(
                "the tokens do not fill the grid",
                found=f"{x.shape[2]} tokens",
                wanted=f"{prefix} + {height} · {width}",
            )
        along_x, along_y = wide(self.frequencies)
        place = torch.arange(height * width, dtype=along_x.dtype, device=x.device)
        column, row = (place % width)[:, None], (place / width).floor()[:, None]
        angle = column * along_x[:, None] + row * along_y[:, None]  # (H, h · w, d/2)
        turning = wide(x[:, :, prefix:])
        pairs = turning.reshape(*turning.shape[:-1], -1, 2)
        even, odd, cos, sin = pairs[..., 0], pairs[..., 1], angle.cos(), angle.sin()
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
        return torch.cat([x[:, :, :prefix], turned.to(x.dtype)], dim=2)
