"""Which blocks of a matrix are stored, and the index tensors that say so to a kernel.

Shapes: O out features, I in features, p × q one block, R × C the grid of blocks, E stored blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from learnables.errors import LayoutError, ShapeError

Block: TypeAlias = int | tuple[int, int]


class Index(NamedTuple):
    """A layout as int64 tensors: compressed by rows, and the same blocks by columns.

    Attributes:
        row_starts: (R + 1) where the blocks of each block row begin; the last is E.
        columns: (E) block column of each stored block, ascending within a row.
        column_starts: (C + 1) where the blocks of each block column begin in the next two.
        rows: (E) block row of each block, column by column, ascending within a column.
        order: (E) position of that block in the weight.
    """

    row_starts: Tensor
    columns: Tensor
    column_starts: Tensor
    rows: Tensor
    order: Tensor


@final
@dataclass(frozen=True, eq=False)
class Layout:
    """The grid of a block-sparse matrix of shape (O, I) and which of its blocks are stored.

    Blocks at the right and lower edge reach over the matrix where its sizes are no multiples;
    what reaches over is stored, stays zero and takes no part in any product.

    Args:
        out_features: O.
        in_features: I.
        block: (p, q), or one number for square blocks; no larger than the matrix.
        mask: (R, C) booleans, or numbers of which 0 means "not stored"; kept as booleans on the
            CPU.

    Raises:
        LayoutError: A size is not positive, a block exceeds the matrix, the mask holds NaN.
        ShapeError: The mask has another shape than the grid.

    Example:
        >>> layout = Layout(4, 6, 2, [[1, 0, 0], [0, 1, 1]])
        >>> layout.num_blocks, layout.density, layout.fan_in
        (3, 0.5, (2, 4))
    """

    out_features: int
    in_features: int
    block: tuple[int, int]
    mask: Tensor

    def __init__(
        self, out_features: int, in_features: int, block: Block, mask: "Tensor | Sequence[object]"
    ) -> None:
        grid = grid_of(out_features, in_features, block)
        sides = (block, block) if isinstance(block, int) else (int(block[0]), int(block[1]))
        object.__setattr__(self, "out_features", int(out_features))
        object.__setattr__(self, "in_features", int(in_features))
        object.__setattr__(self, "block", sides)
        object.__setattr__(self, "mask", _as_mask(mask, grid, (out_features, in_features), sides))

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C), the number of block rows and block columns."""
        rows, columns = self.mask.shape
        return rows, columns

    @cached_property
    def num_blocks(self) -> int:
        """E, the number of stored blocks."""
        return int(self.mask.sum())

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """(E, p, q), the shape of the tensor that holds the blocks, row by row."""
        return (self.num_blocks, *self.block)

    @cached_property
    def heights(self) -> tuple[int, ...]:
        """How many rows of the matrix each block row covers: p, or less at the edge."""
        return _extents(self.out_features, self.block[0])

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """How many columns of the matrix each block column covers: q, or less at the edge."""
        return _extents(self.in_features, self.block[1])

    @cached_property
    def density(self) -> float:
        """Share of the matrix entries that are stored, without what reaches over its edges."""
        covered = torch.tensor(self.heights) @ (self.mask.long() @ torch.tensor(self.widths))
        return int(covered) / (self.out_features * self.in_features)

    @cached_property
    def fan_in(self) -> tuple[int, ...]:
        """For each block row, how many inputs its outputs really see."""
        return tuple((self.mask.long() @ torch.tensor(self.widths)).tolist())

    @cached_property
    def index(self) -> Index:
        """The index tensors, on the CPU."""
        with torch.device("cpu"):  # also where a model is built on the meta device
            rows, columns = self.mask.nonzero(as_tuple=True)
            columns_T, rows_T = self.mask.t().nonzero(as_tuple=True)
            positions = torch.zeros(self.mask.shape, dtype=torch.long)
            positions[rows, columns] = torch.arange(len(rows))
            return Index(
                _starts(self.mask.sum(1)),
                columns.contiguous(),
                _starts(self.mask.sum(0)),
                rows_T.contiguous(),
                positions[rows_T, columns_T],
            )

    @cached_property
    def edge_mask(self) -> Tensor | None:
        """(E, p, q) True where an entry lies inside the matrix; None where all of them do."""
        p, q = self.block
        if self.out_features % p == 0 and self.in_features % q == 0:
            return None
        with torch.device("cpu"):
            rows, columns = self.mask.nonzero(as_tuple=True)
            inside_p = torch.arange(p) < torch.tensor(self.heights)[rows, None]  # (E, p)
            inside_q = torch.arange(q) < torch.tensor(self.widths)[columns, None]  # (E, q)
            return inside_p[:, :, None] & inside_q[:, None, :]

    def with_mask(self, mask: "Tensor | Sequence[object]") -> "Layout":
        """The same matrix and block size with other blocks stored."""
        return Layout(self.out_features, self.in_features, self.block, mask)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Layout)
            and (self.out_features, self.in_features) == (other.out_features, other.in_features)
            and self.block == other.block
            and torch.equal(self.mask, other.mask)
        )

    def __hash__(self) -> int:
        return hash((self.out_features, self.in_features, self.block, self.num_blocks))

    def __repr__(self) -> str:
        (p, q), (R, C) = self.block, self.grid
        return (
            f"Layout({self.out_features}, {self.in_features}, block=({p}, {q}): "
            f"{self.num_blocks} of {R * C} blocks, density {self.density:.3g})"
        )


def grid_of(out_features: int, in_features: int, block: Block) -> tuple[int, int]:
    """(R, C) for a matrix of that size, the last row and column of blocks reaching over its edge.

    Raises:
        LayoutError: A size is not positive, or the block exceeds the matrix.
    """
    p, q = (block, block) if isinstance(block, int) else block
    if min(out_features, in_features, p, q) < 1:
        raise LayoutError(
            "the sizes of a block-sparse matrix are positive",
            found=f"({out_features}, {in_features}) in blocks of ({p}, {q})",
            wanted="each size ≥ 1",
        )
    if p > out_features or q > in_features:
        raise LayoutError(
            "a block is larger than the matrix",
            found=f"block ({p}, {q})",
            wanted=f"at most ({out_features}, {in_features})",
            mend=f"block=({min(p, out_features)}, {min(q, in_features)})",
        )
    return -(-out_features // p), -(-in_features // q)


def layout_from_index(
    out_features: int, in_features: int, block: Block, row_starts: Tensor, columns: Tensor
) -> Layout:
    """The layout that two index tensors describe, each value checked before it is used.

    Raises:
        LayoutError: They describe no layout of this size: out of range, unordered, repeated.
    """
    R, C = grid_of(out_features, in_features, block)
    row_starts, columns = row_starts.cpu(), columns.cpu()
    check_index(row_starts, columns, (R, C))
    mask = torch.zeros(R, C, dtype=torch.bool, device="cpu")
    rows = torch.repeat_interleave(torch.arange(R, device="cpu"), row_starts.diff())
    mask[rows, columns] = True
    return Layout(out_features, in_features, block, mask)


def check_index(row_starts: Tensor, columns: Tensor, grid: tuple[int, int]) -> None:
    """Refuse index tensors, given on the CPU, that describe no layout of this grid.

    Raises:
        LayoutError: They do not.
    """
    R, C = grid
    E = columns.numel()
    wrong = ""
    if row_starts.dtype != torch.int64 or columns.dtype != torch.int64:
        wrong = f"dtypes {row_starts.dtype} and {columns.dtype}"
    elif row_starts.shape != (R + 1,) or columns.ndim != 1:
        wrong = f"shapes {tuple(row_starts.shape)} and {tuple(columns.shape)}"
    elif int(row_starts[0]) != 0 or int(row_starts[-1]) != E or bool((row_starts.diff() < 0).any()):
        wrong = f"row_starts from {int(row_starts[0])} to {int(row_starts[-1])}, or descending"
    elif E and not 0 <= int(columns.min()) <= int(columns.max()) < C:
        wrong = f"columns from {int(columns.min())} to {int(columns.max())}"
    elif E:
        rows = torch.repeat_interleave(torch.arange(R, device="cpu"), row_starts.diff())
        if bool(((rows * C + columns).diff() <= 0).any()):
            wrong = "columns that are repeated or not ascending within a row"
    if wrong:
        raise LayoutError(
            "index tensors do not describe the blocks of this matrix",
            found=wrong,
            wanted=f"int64; row_starts ({R + 1}) ascending from 0 to {E}, "
            f"columns ({E}) in 0 … {C - 1}, ascending within each row",
        )


def _extents(size: int, step: int) -> tuple[int, ...]:
    return tuple(min(step, size - at) for at in range(0, size, step))


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _as_mask(
    mask: "Tensor | Sequence[object]",
    grid: tuple[int, int],
    shape: tuple[int, int],
    block: tuple[int, int],
) -> Tensor:
    with torch.device("cpu"):
        given = mask.detach().cpu() if isinstance(mask, Tensor) else torch.tensor(mask)
    if tuple(given.shape) != grid:
        raise ShapeError(
            "a mask has one entry for each block",
            found=f"mask of shape {tuple(given.shape)} for a matrix {shape} in blocks {block}",
            wanted=f"{grid}",
        )
    if given.is_floating_point() and bool(given.isnan().any()):
        raise LayoutError(
            "a mask says of each block whether it is stored; NaN says nothing",
            found=f"{int(given.isnan().sum())} NaN",
            wanted="booleans, or numbers of which 0 means not stored",
        )
    return given.bool().clone()
