"""Which blocks to store next: rules that drop and grow blocks, as plain functions of block norms.

Shapes: R × C the grid of blocks, E stored blocks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnables.errors import LayoutError
from learnables.sparse.layout import Layout


@dataclass(frozen=True)
class Standing:
    """What a rule may look at in one layer.

    Attributes:
        mask: (R, C) the blocks that are stored.
        size: (R, C) root mean square of each block's values; 0 where none is stored.
        initial: How many blocks were stored when the schedule began.
        gradient: (R, C) root mean square of the loss's gradient at each block, stored or not;
            None for a rule that does not need it.
    """

    mask: Tensor
    size: Tensor
    initial: int
    gradient: Tensor | None = None


class Rule(ABC):
    """How a topology changes; an immutable object without memory."""

    needs_gradient: bool = False

    @abstractmethod
    def next_masks(
        self, standings: Sequence[Standing], progress: float, generator: torch.Generator
    ) -> list[Tensor]:
        """The masks that follow, (R, C) each, of blocks that compete with each other.

        Args:
            standings: The layers that share one budget of blocks.
            progress: How much of the schedule has passed, 0 to 1.
            generator: Source of randomness, on the CPU.
        """


@final
@dataclass(frozen=True)
class SET(Rule):
    """Drop the smallest blocks, grow as many anywhere, at random.

    Args:
        fraction: Share of the stored blocks that is exchanged at first; falls to 0 as a half
            cosine.

    Source:
        Mocanu et al., *Scalable training of artificial neural networks with adaptive sparse
        connectivity*, arXiv:1707.04780; by blocks.
    """

    fraction: float = 0.3

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)

    def next_masks(
        self, standings: Sequence[Standing], progress: float, generator: torch.Generator
    ) -> list[Tensor]:
        """Exchange the smallest for random ones."""
        chance = [torch.rand(s.mask.shape, generator=generator) for s in standings]
        return _exchange(standings, chance, self.fraction, progress)


@final
@dataclass(frozen=True)
class RigL(Rule):
    """Drop the smallest blocks, grow as many where the loss asks for them most.

    A block that was dropped and is asked for most stays as it is.

    Args:
        fraction: Share of the stored blocks that is exchanged at first; falls to 0 as a half
            cosine.

    Source:
        Evci et al., *Rigging the lottery: making all tickets winners*, arXiv:1911.11134, section
        3; by blocks, which are ranked by the norm of the gradient.
    """

    fraction: float = 0.3
    needs_gradient = True

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)

    def next_masks(
        self, standings: Sequence[Standing], progress: float, generator: torch.Generator
    ) -> list[Tensor]:
        """Exchange the smallest for those of the largest gradient."""
        wanted = [s.gradient for s in standings if s.gradient is not None]
        assert len(wanted) == len(standings)
        return _exchange(standings, wanted, self.fraction, progress)


@final
@dataclass(frozen=True)
class Prune(Rule):
    """Drop the smallest blocks until a density is reached; grow none.

    The number of stored blocks falls as the cube of the time that is left, quickly at first.

    Args:
        density: Share of the blocks at the end, in (0, 1].

    Source:
        Zhu and Gupta, *To prune, or not to prune*, arXiv:1710.01878, equation 1; by blocks.
    """

    density: float

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise LayoutError(
                "the density to prune to is a share of the blocks",
                found=f"density={self.density}",
                wanted="0 < density ≤ 1",
            )

    def next_masks(
        self, standings: Sequence[Standing], progress: float, generator: torch.Generator
    ) -> list[Tensor]:
        """Keep the largest."""
        end = max(len(standings), round(self.density * sum(s.mask.numel() for s in standings)))
        start, stored = (
            sum(counts)
            for counts in zip(*((s.initial, int(s.mask.sum())) for s in standings), strict=True)
        )
        keep = round(end + (start - end) * (1 - min(progress, 1.0)) ** 3)
        return _strongest(standings, min(keep, stored))


def source_of(old: Layout, new: Layout) -> Tensor:
    """For each block of ``new`` its position among those of ``old``, -1 where it is new: (E)."""
    positions = torch.full(old.grid, -1, dtype=torch.long, device="cpu")
    positions[old.mask] = torch.arange(old.num_blocks, device="cpu")
    return positions[new.mask]


def block_rms(weight: Tensor, layout: Layout) -> Tensor:
    """Root mean square of each stored block's values within the matrix: (E, p, q) → (R, C)."""
    sizes = torch.zeros(layout.grid, dtype=torch.float64)
    sizes[layout.mask] = weight.detach().double().square().sum((1, 2)).cpu()
    return (sizes / _entries(layout)).sqrt()


def gradient_rms(gradient: Tensor, layout: Layout) -> Tensor:
    """Root mean square of each block of a dense (O, I) matrix: → (R, C)."""
    (R, C), (p, q) = layout.grid, layout.block
    squares = gradient.new_zeros(R * p, C * q)
    squares[: gradient.shape[0], : gradient.shape[1]] = gradient.square()
    sums = squares.view(R, p, C, q).sum((1, 3), dtype=torch.float64).cpu()
    return (sums / _entries(layout)).sqrt()


def _entries(layout: Layout) -> Tensor:
    heights, widths = torch.tensor(layout.heights), torch.tensor(layout.widths)
    return (heights[:, None] * widths).double()


def _exchange(
    standings: Sequence[Standing], wanted: Sequence[Tensor], fraction: float, progress: float
) -> list[Tensor]:
    """Drop the smallest share, grow as many where ``wanted`` is largest among the rest."""
    share = fraction / 2 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    stored = sum(int(s.mask.sum()) for s in standings)
    free = sum(s.mask.numel() for s in standings) - stored
    moves = min(int(share * stored), free)
    kept = _strongest(standings, max(stored - moves, sum(bool(s.mask.any()) for s in standings)))
    candidates = [
        torch.where(mask, -math.inf, one.double()) for mask, one in zip(kept, wanted, strict=True)
    ]
    order = torch.cat([one.flatten() for one in candidates]).argsort(descending=True, stable=True)
    grown = torch.zeros(order.numel(), dtype=torch.bool)
    grown[order[: stored - sum(int(mask.sum()) for mask in kept)]] = True
    parts = torch.split(grown, [mask.numel() for mask in kept])
    return [mask | part.view(mask.shape) for mask, part in zip(kept, parts, strict=True)]


def _strongest(standings: Sequence[Standing], keep: int) -> list[Tensor]:
    """The ``keep`` largest stored blocks of all layers, one in each layer at least."""
    ranks = []
    for s in standings:
        size = torch.where(s.mask, s.size.double(), -math.inf)
        if s.mask.any():
            size.view(-1)[size.argmax()] = math.inf  # a layer is never emptied
        ranks.append(size)
    order = torch.cat([one.flatten() for one in ranks]).argsort(descending=True, stable=True)
    kept = torch.zeros(order.numel(), dtype=torch.bool)
    kept[order[:keep]] = True
    parts = torch.split(kept, [one.numel() for one in ranks])
    return [part.view(s.mask.shape) & s.mask for part, s in zip(parts, standings, strict=True)]


def _check_fraction(fraction: float) -> None:
    """Refuse a share of blocks to exchange outside [0, 1].

    Raises:
        LayoutError: It is.
    """
    if not 0 <= fraction <= 1:
        raise LayoutError(
            "the share of blocks to exchange is out of range",
            found=f"fraction={fraction}",
            wanted="0 ≤ fraction ≤ 1",
        )
