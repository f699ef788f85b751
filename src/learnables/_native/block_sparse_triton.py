"""The products of block_sparse.c on a GPU: two persistent kernels, tuned for each shape once.

``_panels`` computes y = x · Wᵀ + bias, and g · W with the roles of rows and columns exchanged: each
tile of the result runs through the stored blocks of its block row (or column) in one loop, so that
loads are pipelined across blocks. ``_sampled`` computes gᵀ · x, a tile of one stored block at a
time. Sums are in float32, in a fixed order.
"""
# Triton reads the annotations of a kernel as part of its code, and knows only its own.
# ruff: noqa: ANN001, ANN202
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False

import contextlib
import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels compute in."""

# The size of a batch rounded up (BUCKET) is what a choice is kept for: a last, shorter batch should
# not tune anew.

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_PANELS = [
    triton.Config({"TILE_M": m}, num_warps=warps, num_stages=stages)
    for m, warps, stages in ((128, 8, 3), (128, 4, 4), (64, 4, 4), (32, 4, 5), (16, 4, 5))
]
_SAMPLED = [
    triton.Config({"TILE_K": k}, num_warps=warps, num_stages=stages)
    for k, warps, stages in ((64, 4, 3), (64, 8, 3), (32, 4, 4), (128, 8, 2))
]
if _INTERPRETED:  # nothing to tune
    _PANELS, _SAMPLED = _PANELS[-2:-1], _SAMPLED[2:3]


@functools.cache
def available(device: torch.device) -> tuple[bool, str]:
    """Whether the kernels can be compiled and launched on ``device``, and why not."""
    if device.type == "cpu":
        return _INTERPRETED, "interpreted" if _INTERPRETED else "Triton has no CPU backend"
    if device.type != "cuda":
        return False, f"not written for {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False, "needs a GPU of compute capability 8.0"
    try:
        one = torch.ones(16, 16, device=device)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        starts = torch.tensor([0, 1], device=device)
        _launch_panels(one, one[None], None, starts, zero, None, 16, transposed=True)
    except Exception as error:  # no C compiler for the launcher, a driver that is too old, ...
        return False, f"{type(error).__name__}: {error}".splitlines()[0]
    return True, f"triton {triton.__version__}"


def fits(block: tuple[int, int]) -> bool:
    """Whether blocks of this size fill the tiles of a tensor core: multiples of 16."""
    return block[0] % 16 == 0 and block[1] % 16 == 0


def product(
    x: Tensor, weight: Tensor, index: Any, bias: Tensor | None, out_features: int
) -> Tensor:
    """X · Wᵀ + bias, for an index that was checked."""
    return _launch_panels(
        x, weight, bias, index.row_starts, index.columns, None, out_features, transposed=True
    )


def transposed_product(g: Tensor, weight: Tensor, index: Any, in_features: int) -> Tensor:
    """G · W, for an index that was checked."""
    return _launch_panels(
        g, weight, None, index.column_starts, index.rows, index.order, in_features,
        transposed=False,
    )  # fmt: skip


def sampled_product(
    g: Tensor, x: Tensor, index: Any, row_of: Tensor, block: tuple[int, int]
) -> Tensor:
    """gᵀ · x at the stored blocks, for an index that was checked; ``row_of``: block row of each."""
    (p, q), E = block, len(index.columns)
    weight = x.new_empty(E, p, q)
    if not E:
        return weight
    g, x = g.contiguous(), x.contiguous()
    tile_p, tile_q = _tile(p), _tile(q)
    tiles = E * (p // tile_p) * (q // tile_q)
    with _on(x.device):
        _sampled[lambda _: (_programs(x.device, tiles),)](
            g, x, weight, row_of, index.columns, x.shape[0], g.shape[1], x.shape[1], tiles,
            P=p, Q=q, TILE_P=tile_p, TILE_Q=tile_q, PRECISION=_precision(x),
            WIDEN=_INTERPRETED, BUCKET=triton.next_power_of_2(len(x)),
        )  # fmt: skip
    return weight


def _launch_panels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    places: Tensor,
    order: Tensor | None,
    width: int,
    *,
    transposed: bool,
) -> Tensor:
    """One kernel for both directions: ``transposed`` says that blocks are (width, depth)."""
    x, weight = x.contiguous(), weight.contiguous()
    _, p, q = weight.shape
    depth_of_block, width_of_block = (q, p) if transposed else (p, q)
    y = x.new_empty(x.shape[0], width)
    if not y.numel():
        return y
    tile_n, tile_k = _tile(width_of_block), min(_tile(depth_of_block), 64)
    columns = (len(starts) - 1) * (width_of_block // tile_n)
    with _on(x.device):
        _panels[lambda chosen: (_programs(x.device, columns * -(-len(x) // chosen["TILE_M"])),)](
            x, weight, y if bias is None else bias, y, starts, places,
            places if order is None else order, x.shape[0], x.shape[1], width, columns,
            TRANSPOSED=transposed, DEPTH=depth_of_block, WIDTH=width_of_block,
            HAS_BIAS=bias is not None, HAS_ORDER=order is not None, TILE_N=tile_n, TILE_K=tile_k,
            PRECISION=_precision(x), WIDEN=_INTERPRETED, BUCKET=triton.next_power_of_2(len(x)),
        )  # fmt: skip
    return y


@triton.autotune(_PANELS, key=["BUCKET", "depth", "width", "DEPTH", "WIDTH", "TRANSPOSED"])
@triton.jit
def _panels(
    x, weight, bias, y, starts, places, order, samples, depth, width, columns,
    TRANSPOSED: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BUCKET: tl.constexpr,
):  # fmt: skip
    rounds = DEPTH // TILE_K  # of one block
    tiles_of_block = WIDTH // TILE_N
    rows = tl.cdiv(samples, TILE_M)
    for tile in range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        # Neighbours share their blocks, which stay in the second-level cache.
        m, column = tile % rows, tile // rows
        group, n = column // tiles_of_block, column % tiles_of_block
        begin, end = tl.load(starts + group).to(tl.int32), tl.load(starts + group + 1).to(tl.int32)
        sample = m * TILE_M + tl.arange(0, TILE_M)
        inside = n * TILE_N + tl.arange(0, TILE_N)
        rows_of_x = x + sample.to(tl.int64)[:, None] * depth
        total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
        for turn in range(begin * rounds, end * rounds):
            at, k = turn // rounds, turn % rounds * TILE_K + tl.arange(0, TILE_K)
            place = tl.load(places + at).to(tl.int32)
            position = tl.load(order + at) if HAS_ORDER else at.to(tl.int64)
            block = weight + position * (DEPTH * WIDTH)
            term = place * DEPTH + k
            there = (sample < samples)[:, None] & (term < depth)[None, :]
            left = tl.load(rows_of_x + term[None, :], there, other=0)
            if TRANSPOSED:  # a block holds a row of terms for each column of the result
                right = tl.load(block + k[:, None] + inside[None, :] * DEPTH)
            else:
                right = tl.load(block + k[:, None] * WIDTH + inside[None, :])
            if WIDEN:  # the interpreter multiplies the bits of bfloat16
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision=PRECISION)
        across = group * WIDTH + inside
        if HAS_BIAS:
            total += tl.load(bias + across, across < width, other=0).to(tl.float32)[None, :]
        out = y + sample.to(tl.int64)[:, None] * width + across[None, :]
        there = (sample < samples)[:, None] & (across < width)[None, :]
        tl.store(out, total.to(y.dtype.element_ty), there)


@triton.autotune(_SAMPLED, key=["BUCKET", "height", "width", "P", "Q"])
@triton.jit
def _sampled(
    g, x, weight, rows, columns, samples, height, width, tiles,
    P: tl.constexpr, Q: tl.constexpr, TILE_P: tl.constexpr, TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, BUCKET: tl.constexpr,
):  # fmt: skip
    across = Q // TILE_Q
    per_block = P // TILE_P * across
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        at, inside = tile // per_block, tile % per_block
        i = inside // across * TILE_P + tl.arange(0, TILE_P)
        j = inside % across * TILE_Q + tl.arange(0, TILE_Q)
        down = tl.load(rows + at).to(tl.int32) * P + i
        right_of = tl.load(columns + at).to(tl.int32) * Q + j
        total = tl.zeros((TILE_P, TILE_Q), dtype=tl.float32)
        for start in range(0, samples, TILE_K):
            sample = start + tl.arange(0, TILE_K)
            row = sample.to(tl.int64)
            there = (down < height)[:, None] & (sample < samples)[None, :]
            left = tl.load(g + row[None, :] * height + down[:, None], there, other=0)
            there = (sample < samples)[:, None] & (right_of < width)[None, :]
            right = tl.load(x + row[:, None] * width + right_of[None, :], there, other=0)
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision=PRECISION)
        out = weight + at.to(tl.int64) * (P * Q) + i[:, None] * Q + j[None, :]
        tl.store(out, total.to(weight.dtype.element_ty))


def _tile(size: int) -> int:
    """The largest power of two that divides ``size``, 128 at most."""
    return min(size & -size, 128)


def _precision(x: Tensor) -> str:
    """As torch's own products of float32: exact, unless it was allowed to use TF32."""
    exact = x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def _programs(device: torch.device, tiles: int) -> int:
    if device.type != "cuda":
        return min(tiles, 3)  # fewer than tiles, so that the interpreter takes the loop too
    return min(tiles, 2 * torch.cuda.get_device_properties(device).multi_processor_count)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
