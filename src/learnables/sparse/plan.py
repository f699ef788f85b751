"""An index read once: the Python lists that the kernels in plain torch walk through."""

from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias, final
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from learnables.sparse.layout import Index, check_index

Group: TypeAlias = tuple[tuple[int, int], ...]


@final
@dataclass(frozen=True)
class Plan:
    """A checked index, spelled out.

    Attributes:
        by_row: For each block row its (position in the weight, block column) pairs.
        by_column: For each block column its (position in the weight, block row) pairs.
        row_of: (E) block row of each stored block, on the device of the index.
        row_ends: Where the blocks of each block row end in the index; starts with 0.
        column_ends: The same for block columns.
    """

    by_row: tuple[Group, ...]
    by_column: tuple[Group, ...]
    row_of: Tensor
    row_ends: tuple[int, ...]
    column_ends: tuple[int, ...]


_Key: TypeAlias = "tuple[ReferenceType[Tensor], ReferenceType[Tensor], int, int]"
_kept: dict[int, tuple[_Key, Plan]] = {}
_KEPT_AT_MOST = 4096


def plan_of(index: Index) -> Plan:
    """The plan of ``index``; kept while its tensors live and nobody writes to them.

    Reading an index that lies on a GPU waits for the GPU, once.

    Raises:
        LayoutError: The index tensors describe no matrix of this grid.
    """
    starts, columns = index.row_starts, index.columns
    if starts.is_inference() or columns.is_inference():  # torch counts no writes to these
        return _read(index)
    found = _kept.get(id(columns))
    if found is not None:
        (kept_starts, kept_columns, *versions), plan = found
        if (
            kept_starts() is starts
            and kept_columns() is columns
            and versions == [starts._version, columns._version]
        ):
            return plan
    plan = _read(index)
    if len(_kept) >= _KEPT_AT_MOST:
        _kept.clear()
    name = id(columns)
    key = (
        ref(starts),
        ref(columns, lambda _: _kept.pop(name, None)),
        starts._version,
        columns._version,
    )
    _kept[name] = (key, plan)
    return plan


def _read(index: Index) -> Plan:
    grid = (index.row_starts.numel() - 1, index.column_starts.numel() - 1)
    starts, columns = index.row_starts.cpu(), index.columns.cpu()
    check_index(starts, columns, grid)
    ends, across = starts.tolist(), columns.tolist()
    by_row = tuple(
        tuple(zip(range(begin, end), across[begin:end], strict=True))
        for begin, end in pairwise(ends)
    )
    by_column: list[list[tuple[int, int]]] = [[] for _ in range(grid[1])]
    for row, group in enumerate(by_row):
        for position, column in group:
            by_column[column].append((position, row))
    column_ends = [0]
    for group_of_column in by_column:
        column_ends.append(column_ends[-1] + len(group_of_column))
    rows = torch.arange(grid[0], device="cpu")
    row_of = torch.repeat_interleave(rows, starts.diff()).to(index.columns.device)
    return Plan(by_row, tuple(map(tuple, by_column)), row_of, tuple(ends), tuple(column_ends))
