"""Which blocks to store: families of masks, each a function of the grid.

Shapes: R × C the grid of blocks.
"""

import torch
from torch import Tensor

from learnables.arguments import as_annotated
from learnables.errors import LayoutError


@as_annotated
def random(
    rows: int, columns: int, density: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """A random mask whose rows, and whose columns, hold equally many blocks, give or take one.

    With equal fan-in and fan-out no output is starved and no processor waits for a longer row;
    a mask drawn block by block leaves some rows empty at low density.

    Args:
        rows: R.
        columns: C.
        density: Share of the blocks, in (0, 1]; rounded to whole blocks, one at least.
        generator: Source of randomness, on the CPU; torch's default generator when None.

    Returns:
        (R, C) booleans on the CPU.

    Raises:
        LayoutError: The density is outside (0, 1].

    Example:
        >>> mask = random(8, 8, 0.25)
        >>> set(mask.sum(0).tolist()), set(mask.sum(1).tolist())
        ({2}, {2})

    Source:
        Constant fan-in, by block: Lasby et al., *Dynamic sparse training with structured sparsity*,
        arXiv:2305.02299.
    """
    total = _total(rows, columns, density)
    mask = torch.zeros(rows, columns, dtype=torch.bool, device="cpu")
    taken = torch.zeros(columns, device="cpu")
    order = torch.randperm(rows, generator=generator, device="cpu").tolist()
    for place, row in enumerate(order):
        share = (place + 1) * total // rows - place * total // rows
        # The emptiest columns first, ties by chance: no two columns ever differ by more than one.
        chance = torch.rand(columns, generator=generator, device="cpu")
        chosen = (taken + chance).argsort()[:share]
        mask[row, chosen] = True
        taken[chosen] += 1
    return mask


@as_annotated
def banded(rows: int, columns: int, density: float) -> Tensor:
    """The blocks nearest to the diagonal: each output sees the inputs around its own place.

    Args:
        rows: R.
        columns: C.
        density: Share of the blocks, in (0, 1]; rounded to whole blocks, one at least.

    Returns:
        (R, C) booleans on the CPU.

    Raises:
        LayoutError: The density is outside (0, 1].

    Example:
        >>> banded(4, 4, 0.6).int()
        tensor([[1, 1, 0, 0],
                [1, 1, 1, 0],
                [0, 1, 1, 1],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    total = _total(rows, columns, density)
    down = (torch.arange(rows, device="cpu", dtype=torch.float64) + 0.5) / rows
    across = (torch.arange(columns, device="cpu", dtype=torch.float64) + 0.5) / columns
    distance = (down[:, None] - across).abs()
    mask = torch.zeros(rows * columns, dtype=torch.bool, device="cpu")
    mask[distance.flatten().argsort(stable=True)[:total]] = True
    return mask.view(rows, columns)


@as_annotated
def butterfly(rows: int, columns: int, density: float | None = None) -> Tensor:
    """The diagonal and those blocks whose row and column numbers differ in one binary digit.

    In n × n blocks every input reaches every output within log₂ n layers, as in a fast Fourier
    transform, at 1 + log₂ n blocks a row. Other grids are stretched from the next power of two.

    Args:
        rows: R.
        columns: C.
        density: At most this share of the blocks: low digits are used first, the diagonal at
            least. None uses all digits.

    Returns:
        (R, C) booleans on the CPU.

    Raises:
        LayoutError: The density is outside (0, 1].

    Example:
        >>> butterfly(4, 4).int()
        tensor([[1, 1, 1, 0],
                [1, 1, 0, 1],
                [1, 0, 1, 1],
                [0, 1, 1, 1]], dtype=torch.int32)

    Source:
        Flat block butterfly: Dao et al., *Pixelated butterfly*, arXiv:2112.00029.
    """
    limit = rows * columns if density is None else _total(rows, columns, density)
    digits = (max(rows, columns) - 1).bit_length()
    fine = torch.arange(1 << digits, device="cpu")
    down, across = fine * rows >> digits, fine * columns >> digits
    mask = torch.zeros(rows, columns, dtype=torch.bool, device="cpu")
    mask[down, across] = True
    for digit in range(digits):
        more = mask.clone()
        more[down, across[fine ^ (1 << digit)]] = True
        if int(more.sum()) > limit:
            break
        mask = more
    return mask


@as_annotated
def n_of_m(
    rows: int, columns: int, n: int = 2, m: int = 4, *, generator: torch.Generator | None = None
) -> Tensor:
    """Of every m neighbouring blocks of a row, n are stored: 2:4 sparsity, by blocks.

    Args:
        rows: R.
        columns: C.
        n: How many of each group; of a last, shorter group as many as it has, n at most.
        m: Group size.
        generator: Source of randomness, on the CPU; torch's default generator when None.

    Returns:
        (R, C) booleans on the CPU.

    Raises:
        LayoutError: Not 1 ≤ n ≤ m.

    Example:
        >>> n_of_m(6, 8).view(6, 2, 4).sum(-1).unique()
        tensor([2])
    """
    if not 1 <= n <= m:
        raise LayoutError(
            "a group of m blocks stores between one and m of them",
            found=f"{n}:{m}",
            wanted="1 ≤ n ≤ m",
        )
    groups = -(-columns // m)
    chance = torch.rand(rows, groups * m, generator=generator, device="cpu")
    chance[:, columns:] = 2.0  # what lies beyond the edge comes last
    rank = chance.view(rows, groups, m).argsort(-1).argsort(-1)
    return (rank < n).view(rows, groups * m)[:, :columns].contiguous()


@as_annotated
def largest(scores: Tensor, density: float) -> Tensor:
    """The blocks with the highest scores; of equal ones, the first.

    Args:
        scores: (R, C), real.
        density: Share of the blocks, in (0, 1]; rounded to whole blocks, one at least.

    Returns:
        (R, C) booleans on the CPU.

    Raises:
        LayoutError: The density is outside (0, 1], or a score is NaN.

    Example:
        >>> largest(torch.tensor([[1.0, 3.0], [2.0, 0.0]]), 0.5)
        tensor([[False,  True],
                [ True, False]])
    """
    rows, columns = scores.shape
    total = _total(rows, columns, density)
    flat = scores.detach().cpu().flatten()
    if bool(flat.isnan().any()):
        raise LayoutError(
            "blocks cannot be ranked by NaN",
            found=f"{int(flat.isnan().sum())} NaN among {flat.numel()} scores",
            wanted="finite scores",
        )
    mask = torch.zeros(rows * columns, dtype=torch.bool, device="cpu")
    mask[flat.argsort(descending=True, stable=True)[:total]] = True
    return mask.view(rows, columns)


def _total(rows: int, columns: int, density: float) -> int:
    """How many blocks a density means.

    Raises:
        LayoutError: It is outside (0, 1].
    """
    if not 0 < density <= 1:
        raise LayoutError(
            "the density of a block-sparse matrix is a share of its blocks",
            found=f"density={density}",
            wanted="0 < density ≤ 1",
        )
    return max(1, round(density * rows * columns))
