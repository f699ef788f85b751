"""The initialiser of block-sparse weights: by the inputs that an output really sees."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnables.errors import ShapeError
from learnables.init.base import Initializer
from learnables.sparse.layout import Layout


@final
@dataclass(frozen=True)
class real_fan_in(Initializer):  # noqa: N801 - reads as torch's initialisers do
    """Uniform in ±gain / √n, with n the number of inputs that the output sees through its blocks.

    What ``nn.Linear`` does with all its inputs. A dense rule on a density of 10 % would make the
    output three times too small. Fills the stored blocks (E, p, q), 0 beyond the matrix's edge, or
    a bias (O).

    Args:
        layout: Which blocks are stored.
        gain: 1 is the default of ``nn.Linear``; √6 keeps the variance through a ReLU.

    Example:
        >>> layout = Layout(4, 8, 4, [[1, 0]])
        >>> bool((real_fan_in(layout)(torch.empty(1, 4, 4)).abs() <= 0.5).all())
        True
    """

    layout: Layout
    gain: float = 1.0

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place.

        Raises:
            ShapeError: ``x`` is neither the weight nor a bias of this layout.
        """
        layout = self.layout
        per_row = torch.tensor([_bound(self.gain, n) for n in layout.fan_in], device="cpu")
        if tuple(x.shape) == layout.weight_shape:
            rows = layout.mask.nonzero()[:, 0]
            bounds = per_row[rows].view(-1, 1, 1)
            inside = layout.edge_mask
            bounds = bounds if inside is None else bounds * inside
        elif tuple(x.shape) == (layout.out_features,):
            bounds = per_row.repeat_interleave(layout.block[0])[: layout.out_features]
        else:
            raise ShapeError(
                "the initialiser is made for another shape",
                found=f"{tuple(x.shape)}",
                wanted=f"{layout.weight_shape} or ({layout.out_features},)",
            )
        x.uniform_(-1.0, 1.0, generator=generator).mul_(bounds.to(x))

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """Root mean square over all entries of what their rows get, with the zeros at the edge."""
        layout, is_weight = self.layout, len(shape) == 3
        squares = sum(
            height * (n if is_weight else 1) * _bound(self.gain, n) ** 2 / 3
            for height, n in zip(layout.heights, layout.fan_in, strict=True)
        )
        return math.sqrt(squares / max(math.prod(shape), 1))


def _bound(gain: float, inputs: int) -> float:
    return gain / math.sqrt(inputs) if inputs else 0.0
