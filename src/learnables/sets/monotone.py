"""Vectors in order: calibration curves, quantiles, schedules."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.sets.base import Set, can_look


@final
@dataclass(frozen=True)
class Monotone(Set):
    """Vectors whose entries rise (or fall) along the last dimension; equal neighbours are allowed.

    Args:
        increasing: False for entries that fall.

    Example:
        >>> Monotone().project(torch.tensor([1.0, 3.0, 2.0]))
        tensor([1.0000, 2.5000, 2.5000])

    Cost:
        O(n) a round, a few rounds on a CPU; O(n²) time and memory where a compiler or an
        accelerator forbids looking at the data.

    Source:
        Best and Chakravarti, *Active set algorithms for isotonic regression*,
        doi:10.1007/BF01580873; the closed form: Robertson, Wright and Dykstra, *Order restricted
        statistical inference*, theorem 1.4.4.
    """

    increasing: bool = True
    measure: ClassVar[str] = "largest step in the wrong direction"

    def nearest(self, x: Tensor) -> Tensor:
        """The mean over each block of neighbours that are out of order."""
        rising = x if self.increasing else -x
        with torch.no_grad():
            block = blocks(rising)
        mean = _means(x, block)
        return mean.gather(-1, block)

    def outside(self, x: Tensor) -> Tensor:
        """The largest step in the wrong direction."""
        if x.shape[-1] == 1:
            return x.new_zeros(x.shape[:-1])
        step = x.diff(dim=-1)
        return (-step if self.increasing else step).amax(-1).clamp_min(0)


def blocks(x: Tensor) -> Tensor:
    """For each entry, the number of the block whose mean it takes in the rising projection."""
    if not can_look(x):
        return _blocks_by_bounds(x)
    block = torch.arange(x.shape[-1]).expand(x.shape).contiguous()
    while True:
        # Merging every run of blocks whose means fall is safe at once: pooling a violator can
        # only pool what the exact solution pools.
        level = _means(x, block).gather(-1, block)
        falls = (level[..., 1:] < level[..., :-1]) & (block[..., 1:] != block[..., :-1])
        if not falls.any():
            return block
        opens = (block[..., 1:] != block[..., :-1]) & ~falls
        block = torch.nn.functional.pad(opens.cumsum(-1), (1, 0))


def _means(x: Tensor, block: Tensor) -> Tensor:
    count = torch.zeros_like(x).scatter_add(-1, block, torch.ones_like(x))
    return torch.zeros_like(x).scatter_add(-1, block, x) / count.clamp_min(1)


def _blocks_by_bounds(x: Tensor) -> Tensor:
    """Blocks of ``max over i' ≤ i of min over k ≥ i of mean(x[i'..k])``, all means at once."""
    n = x.shape[-1]
    total = torch.nn.functional.pad(x.double().cumsum(-1), (1, 0))
    length = torch.arange(n + 1, device=x.device)
    span = length[None, 1:] - length[:-1, None]  # (first, last) → number of entries
    mean = (total[..., None, 1:] - total[..., :-1, None]) / span.clamp_min(1)
    mean = mean.masked_fill(span <= 0, torch.inf)
    least = mean.flip(-1).cummin(-1).values.flip(-1)  # min over last ≥ k
    least = least.masked_fill(span <= 0, -torch.inf)
    level = least.cummax(-2).values.diagonal(dim1=-2, dim2=-1)  # max over first ≤ i
    new = level[..., 1:] > level[..., :-1]
    return torch.nn.functional.pad(new.cumsum(-1), (1, 0))
