"""An index read once: the Python lists that the kernels in plain torch walk through."""

from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias, final
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from learnables.errors import LayoutError
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


_Key: TypeAlias = tuple[tuple[ReferenceType[Tensor], int], ...]
_kept: dict[int, tuple[_Key, Plan]] = {}
_KEPT_AT_MOST = 4096


def plan_of(index: Index) -> Plan:
    """The plan of ``index``; kept while its tensors live and nobody writes to them.

    Reading an index that lies on a GPU waits for the GPU, once.

    Raises:
        LayoutError: The index tensors describe no matrix of this grid, or those by columns other
            blocks than those by rows. What follows them may then trust each of them.
    """
    if any(part.is_inference() for part in index):  # torch counts no writes to these
        return _read(index)
    name = id(index.columns)
    found = _kept.get(name)
    if found is not None:
        key, plan = found
        if all(
            held() is part and version == part._version
            for (held, version), part in zip(key, index, strict=True)
        ):
            return plan
    plan = _read(index)
    if len(_kept) >= _KEPT_AT_MOST:
        _kept.clear()
    forget = ref(index.columns, lambda _: _kept.pop(name, None))
    key = tuple((forget if part is index.columns else ref(part), part._version) for part in index)
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
    _check_columns(index, column_ends, by_column)
    rows = torch.arange(grid[0], device="cpu")
    row_of = torch.repeat_interleave(rows, starts.diff()).to(index.columns.device)
    return Plan(by_row, tuple(map(tuple, by_column)), row_of, tuple(ends), tuple(column_ends))


def _check_columns(index: Index, ends: list[int], by_column: list[list[tuple[int, int]]]) -> None:
    """Refuse tensors by columns that do not list the blocks of those by rows.

    Raises:
        LayoutError: They do not.
    """
    pairs = [pair for group in by_column for pair in group]
    wanted = {
        "column_starts": ends,
        "rows": [row for _, row in pairs],
        "order": [position for position, _ in pairs],
    }
    wrong = [name for name, values in wanted.items() if getattr(index, name).tolist() != values]
    if wrong:
        raise LayoutError(
            "the index by columns does not describe the blocks that the index by rows lists",
            found=f"other values in {', '.join(wrong)}",
            wanted="those of one layout",
            mend="layer.load_state_dict(...), or layer.rewire(mask), writes them anew",
        )
