"""The three products of a block-sparse matrix in plain torch: always there, on every device.

With x (B, I), stored blocks W (E, p, q) and g (B, O):

    product              y = x · Wᵀ + bias     (B, O)
    transposed product   gx = g · W            (B, I)
    sampled product      gW = gᵀ · x           (E, p, q), at the stored blocks only

Four ways to compute them, each the quickest somewhere:

* *one by one*: a matrix product per block, from a column slice of the input straight into a column
  slice of the output; nothing is gathered. For fp32 and fp64 with many samples.
* *panels*: gather the columns that a block row needs, then one matrix product for the row. The sum
  is taken inside it, which in half precision is both quicker and exact to fp32. For bf16 and fp16.
* *batched*: gather an input slice for each block, one batched product, add up by rows. Few calls
  whatever the number of blocks. For few samples, and on GPUs.
* *filled in*: write the blocks into a dense matrix. For tiny blocks, or hardly any left out.

Shapes: B samples, O out features, I in features, p × q one block, R × C the grid of blocks, E
stored blocks. Inputs are padded to the grid, R·p and C·q.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from learnables.sparse.layout import Index
from learnables.sparse.plan import Group, plan_of

_HALF = (torch.bfloat16, torch.float16)
_GATHER_CPU = 1 << 18  # entries gathered at once: 1 MiB of fp32, the second-level cache of a core
_GATHER_GPU = 1 << 26
_FEW_SAMPLES = 32
_SMALL_PRODUCT = 1 << 17  # multiplications per block below which a call costs more than its work

_THIN, _THIN_PRODUCT = 48, 3 << 19  # blocks whose sums end too soon, up to so many multiplications
_BUSY = 4  # blocks in a row for which gathering their inputs is cheaper than a call for each,
_CACHED = 3 << 17  # where they stay in the cache

WAYS = ("one by one", "panels", "batched", "filled in")


def product(
    x: Tensor,
    weight: Tensor,
    index: Index,
    out_features: int,
    bias: Tensor | None = None,
    *,
    way: str | None = None,
) -> Tensor:
    """X · Wᵀ + bias: (B, I) → (B, O); ``way`` is one of `WAYS`, the quickest when None."""
    B, (_, p, q), R = x.shape[0], weight.shape, index.row_starts.numel() - 1
    plan, x = plan_of(index), _padded(x, index.column_starts, q)
    bias = None if bias is None else F.pad(bias, (0, R * p - out_features))
    way = way or choose(x, weight, index)
    if way == "filled in":
        y = F.linear(x, _filled_in(weight, index, plan.row_of), bias)
    elif way == "batched":
        y = _batched(x, weight.mT, index.columns, plan.row_of, R, bias)
    else:
        y = x.new_empty(B, R * p)
        biases: Sequence[Tensor | None] = [None] * R if bias is None else torch.split(bias, p)
        if way == "panels":
            panels = [
                (index.columns[begin:end], weight[begin:end].mT.reshape(-1, p))
                for begin, end in zip(plan.row_ends[:-1], plan.row_ends[1:], strict=True)
            ]
            _panels(x.view(B, x.shape[1] // q, q), panels, torch.split(y, p, 1), biases)
        else:
            _one_by_one(
                torch.split(x, q, 1), weight.mT.unbind(), plan.by_row, torch.split(y, p, 1), biases
            )
    return y[:, :out_features].contiguous()


def transposed_product(
    g: Tensor, weight: Tensor, index: Index, in_features: int, *, way: str | None = None
) -> Tensor:
    """G · W: (B, O) → (B, I)."""
    B, (_, p, q), C = g.shape[0], weight.shape, index.column_starts.numel() - 1
    plan, g = plan_of(index), _padded(g, index.row_starts, p)
    way = way or choose(g, weight, index)
    if way == "filled in":
        gx = g @ _filled_in(weight, index, plan.row_of)
    elif way == "batched":
        gx = _batched(g, weight, plan.row_of, index.columns, C, None)
    else:
        gx, none = g.new_empty(B, C * q), [None] * C
        if way == "panels":
            panels = [
                (index.rows[begin:end], weight[index.order[begin:end]].view(-1, q))
                for begin, end in zip(plan.column_ends[:-1], plan.column_ends[1:], strict=True)
            ]
            _panels(g.view(B, g.shape[1] // p, p), panels, torch.split(gx, q, 1), none)
        else:
            _one_by_one(
                torch.split(g, p, 1), weight.unbind(), plan.by_column, torch.split(gx, q, 1), none
            )
    return gx[:, :in_features].contiguous()


def sampled_product(
    g: Tensor, x: Tensor, index: Index, block: tuple[int, int], *, way: str | None = None
) -> Tensor:
    """gᵀ · x at the stored blocks: (B, O), (B, I) → (E, p, q); 0 beyond the matrix's edge."""
    B, (p, q), E = x.shape[0], block, index.columns.numel()
    R, C = index.row_starts.numel() - 1, index.column_starts.numel() - 1
    plan = plan_of(index)
    x, g = _padded(x, index.column_starts, q), _padded(g, index.row_starts, p)
    weight = x.new_empty(E, p, q)
    way = way or choose(x, weight, index, sampled=True)
    if way == "filled in":
        dense = (g.mT @ x).view(R, p, C, q).transpose(1, 2)
        return dense[plan.row_of, index.columns].contiguous()
    if way == "batched":
        return _batched_sampled(g.view(B, R, p), x.view(B, C, q), plan.row_of, index.columns)
    if way == "panels":
        xs, gs = x.view(B, C, q), torch.split(g.mT, p)
        for row, (begin, end) in enumerate(zip(plan.row_ends[:-1], plan.row_ends[1:], strict=True)):
            if begin < end:
                panel = xs.index_select(1, index.columns[begin:end]).flatten(1)
                weight[begin:end] = (gs[row] @ panel).view(p, -1, q).transpose(0, 1)
        return weight
    parts, gs, xs_of = weight.unbind(), torch.split(g.mT, p), torch.split(x, q, 1)
    for row, group in enumerate(plan.by_row):
        for position, column in group:
            torch.mm(gs[row], xs_of[column], out=parts[position])
    return weight


def dense(weight: Tensor, index: Index, shape: tuple[int, int]) -> Tensor:
    """The matrix itself, (O, I), zeros where nothing is stored."""
    return _filled_in(weight, index, plan_of(index).row_of)[: shape[0], : shape[1]].contiguous()


def choose(x: Tensor, weight: Tensor, index: Index, *, sampled: bool = False) -> str:
    """The quickest of `WAYS`, by what was measured on one core of an AMD EPYC with AVX-512."""
    B, (E, p, q) = x.shape[0], weight.shape
    rows, columns = index.row_starts.numel() - 1, index.column_starts.numel() - 1
    if B > _FEW_SAMPLES and E / (rows * columns) * (1 + 36 / min(p, q)) > 1.3:
        return "filled in"
    if x.device.type != "cpu" or B <= _FEW_SAMPLES:
        return "batched"
    work = B * p * q
    if x.dtype in _HALF or work < _SMALL_PRODUCT or (min(p, q) < _THIN and work < _THIN_PRODUCT):
        return "panels"
    gathered = B * q * E / rows
    return "panels" if sampled and _BUSY * rows <= E and gathered <= _CACHED else "one by one"


def _padded(x: Tensor, starts: Tensor, step: int) -> Tensor:
    """``x`` with columns for whole blocks, and rows that lie one after another."""
    missing = (starts.numel() - 1) * step - x.shape[1]
    return F.pad(x, (0, missing)) if missing else x.contiguous()


def _one_by_one(
    xs: Sequence[Tensor],
    blocks: Sequence[Tensor],
    groups: Sequence[Group],
    ys: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> None:
    for y, group, bias in zip(ys, groups, biases, strict=True):
        if not group:
            y.copy_(bias) if bias is not None else y.zero_()
            continue
        position, place = group[0]
        if bias is None:
            torch.mm(xs[place], blocks[position], out=y)
        else:
            torch.addmm(bias, xs[place], blocks[position], out=y)
        for position, place in group[1:]:
            y.addmm_(xs[place], blocks[position])


def _panels(
    xs: Tensor,
    panels: Sequence[tuple[Tensor, Tensor]],
    ys: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> None:
    for y, (places, blocks), bias in zip(ys, panels, biases, strict=True):
        if not places.numel():
            y.copy_(bias) if bias is not None else y.zero_()
            continue
        panel = xs.index_select(1, places).flatten(1)
        if bias is None:
            torch.mm(panel, blocks, out=y)
        else:
            torch.addmm(bias, panel, blocks, out=y)


def _batched(
    x: Tensor, blocks: Tensor, places: Tensor, targets: Tensor, groups: int, bias: Tensor | None
) -> Tensor:
    B, (E, k, n) = x.shape[0], blocks.shape
    wide = torch.float32 if x.dtype in _HALF else x.dtype
    xs = x.view(B, x.shape[1] // k, k).transpose(0, 1)  # (places, B, k)
    y = x.new_zeros(groups, B, n, dtype=wide)
    if bias is not None:
        y += bias.view(groups, 1, n)
    for part in _tiles(x, E * max(k, n)):
        y[:, part].index_add_(0, targets, torch.bmm(xs[:, part][places], blocks).to(wide))
    return y.transpose(0, 1).reshape(B, groups * n).to(x.dtype)


def _batched_sampled(gs: Tensor, xs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    tiles = _tiles(xs, len(rows) * max(gs.shape[2], xs.shape[2]))
    wide = torch.float32 if xs.dtype in _HALF and len(tiles) > 1 else xs.dtype
    weight = torch.zeros(len(rows), gs.shape[2], xs.shape[2], dtype=wide, device=xs.device)
    for part in tiles:
        g = gs[part].transpose(0, 1)[rows]  # (E, b, p)
        x = xs[part].transpose(0, 1)[columns]  # (E, b, q)
        weight += torch.bmm(g.mT, x)
    return weight.to(xs.dtype)


def _tiles(x: Tensor, entries: int) -> list[slice]:
    """Slices of the samples, so many that about a cache of input is gathered for each."""
    limit = _GATHER_CPU if x.device.type == "cpu" else _GATHER_GPU
    step = max(1, limit // max(entries, 1))
    return [slice(at, at + step) for at in range(0, x.shape[0], step)]


def _filled_in(weight: Tensor, index: Index, row_of: Tensor) -> Tensor:
    (_, p, q), R, C = weight.shape, index.row_starts.numel() - 1, index.column_starts.numel() - 1
    grid = weight.new_zeros(R, C, p, q)
    grid[row_of, index.columns] = weight
    return grid.transpose(1, 2).reshape(R * p, C * q)
