"""The look of statistics.c on a GPU: one launch over all tensors, one that adds up; nothing waits.

Launches: a memset of the histogram, ``_look`` with one program per chunk of 65536 numbers, and
``_add_up`` with one program per tensor. The list of addresses travels from pinned memory.
"""
# Triton reads the annotations of a kernel as part of its code, and knows only its own.
# ruff: noqa: ANN001, ANN202
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False

import contextlib
import functools
import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_KINDS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
DTYPES = frozenset(_KINDS)
_CHUNK = 1 << 16
_TILE = 1024  # 4 numbers a thread: more would leave too few registers for a second program


@functools.cache
def available(device: torch.device) -> tuple[bool, str]:
    """Whether the kernels can be compiled and launched on ``device``, and why not."""
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return interpreted, "interpreted" if interpreted else "Triton has no CPU backend"
    if device.type != "cuda":
        return False, f"not written for {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False, "needs a GPU of compute capability 8.0"
    try:
        run([torch.zeros(1, device=device)], True)
    except Exception as error:  # no C compiler for the launcher, a driver that is too old, ...
        return False, f"{type(error).__name__}: {error}".splitlines()[0]
    return True, f"triton {triton.__version__}"


def run(tensors: Sequence[Tensor], histogram: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Look at contiguous tensors of ``DTYPES`` on one GPU, or on the CPU under the interpreter.

    Args:
        tensors: What to look at; at least one.
        histogram: Whether to fill the third result.

    Returns:
        As ``statistics.run``, on the device of the tensors and before anything is computed.
    """
    device = tensors[0].device
    rows = len(tensors)
    sizes = torch.tensor([x.numel() for x in tensors])
    chunks = (sizes + _CHUNK - 1) // _CHUNK
    first = torch.cat([torch.zeros(1, dtype=torch.int64), chunks.cumsum(0)])
    addresses = torch.tensor([x.data_ptr() for x in tensors])
    kinds = torch.tensor([_KINDS[x.dtype] for x in tensors])
    row_of = torch.repeat_interleave(torch.arange(rows), chunks)
    total = len(row_of)
    parts = [addresses, sizes, kinds, first, row_of]
    listed = torch.cat(parts)
    if device.type == "cuda":
        listed = listed.pin_memory().to(device, non_blocking=True)
    columns: list[Tensor] = list(listed.split_with_sizes([len(part) for part in parts]))

    partial = torch.empty(6, total, dtype=torch.float64, device=device)
    moments = torch.empty(5, rows, dtype=torch.float64, device=device)
    integers = torch.empty(2, rows, dtype=torch.int64, device=device)
    bins = torch.zeros(rows, 512, dtype=torch.int64, device=device) if histogram else None
    aligned = not bool((addresses % 16).any())
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if total:
            _look[(total,)](
                *columns, partial, partial if bins is None else bins, total,
                HISTOGRAM=histogram, ALIGNED=aligned, CHUNK=_CHUNK, TILE=_TILE, num_warps=8,
            )  # fmt: skip
        _add_up[(rows,)](columns[3], partial, moments, integers, total, rows, STEP=256)
    return moments, integers, bins


@triton.jit
def _load(address, offsets, end, KIND: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr):
    """Numbers of one dtype; past ``end`` 0, unless the tile is ``WHOLE``."""
    pointer = address.to(tl.pointer_type(KIND))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    place = pointer + offsets
    return tl.load(place) if WHOLE else tl.load(place, offsets < end, other=0)


@triton.jit
def _bin32(x):
    return (x.to(tl.int32, bitcast=True) >> 23) & 511


@triton.jit
def _bin64(x):
    bits = x.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) & 0x7FF) - (1023 - 127)
    exponent = tl.minimum(tl.maximum(exponent, 0), 255)
    return tl.where(bits < 0, exponent + 256, exponent).to(tl.int32)


@triton.jit
def _read(address, kind, offsets, end, WHOLE: tl.constexpr, ALIGNED: tl.constexpr):
    """A tile as float64 numbers, and the bin of each."""
    if kind == 0:
        single = _load(address, offsets, end, tl.float32, WHOLE, ALIGNED)
        value, key = single.to(tl.float64), _bin32(single)
    elif kind == 1:
        value = _load(address, offsets, end, tl.float64, WHOLE, ALIGNED)
        key = _bin64(value)
    elif kind == 2:
        single = _load(address, offsets, end, tl.float16, WHOLE, ALIGNED).to(tl.float32)
        value, key = single.to(tl.float64), _bin32(single)
    else:
        upper = _load(address, offsets, end, tl.int16, WHOLE, ALIGNED).to(tl.int32) << 16
        single = upper.to(tl.float32, bitcast=True)
        value, key = single.to(tl.float64), _bin32(single)
    return value, key


@triton.jit
def _count(bins, row, base, window, key, inside, value):
    """Count a tile: what lies in the window of 31 exponents into ``window``, the rest at once.

    Counting into 64 bins takes a fifth of the instructions that 512 take. Zeros are counted by
    ``_look``.
    """
    slot = (key & 255) - base
    windowed = inside & (slot >= 1) & (slot <= 31)
    window += tl.histogram(slot + ((key >> 8) << 5), 64, mask=windowed)
    rest = inside & (~windowed) & (value != 0)  # true of NaN
    if tl.max(rest.to(tl.int32)) > 0:
        found = tl.histogram(key, 512, mask=rest)
        tl.atomic_add(bins + row * 512 + tl.arange(0, 512), found.to(tl.int64), mask=found > 0)
    return window


@triton.jit
def _look(
    addresses, sizes, kinds, first, row_of, partial, bins,
    total, HISTOGRAM: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One chunk: six numbers into ``partial``, counts into the row's bins."""
    chunk = tl.program_id(0)
    row = tl.load(row_of + chunk)
    address, kind = tl.load(addresses + row), tl.load(kinds + row)
    start = (chunk - tl.load(first + row)) * CHUNK
    end = tl.minimum(start + CHUNK, tl.load(sizes + row))
    lane = tl.arange(0, TILE)

    total_sum = tl.zeros([TILE], tl.float64)
    squares = tl.zeros([TILE], tl.float64)
    low = tl.full([TILE], float("inf"), tl.float64)
    high = tl.full([TILE], float("-inf"), tl.float64)
    seen = tl.zeros([TILE], tl.int32)  # zeros, negative zeros and non-finite, 10 bits each
    window = tl.zeros([64], tl.int32)
    base = 0
    begin = start
    while begin < end:
        offsets = begin + lane
        inside = offsets < end
        if begin + TILE <= end:  # loads without a mask are wide
            value, key = _read(address, kind, offsets, end, True, ALIGNED)
        else:
            value, key = _read(address, kind, offsets, end, False, ALIGNED)
        finite = inside & (tl.abs(value) < float("inf"))
        kept = tl.where(finite, value, 0.0)
        total_sum += kept
        squares += kept * kept
        low = tl.minimum(low, tl.where(finite, value, float("inf")))
        high = tl.maximum(high, tl.where(finite, value, float("-inf")))
        zero = inside & (value == 0)
        negative = zero & (key == 256)
        broken = inside & (~finite)
        seen += zero.to(tl.int32) + (negative.to(tl.int32) << 10) + (broken.to(tl.int32) << 20)
        if HISTOGRAM:
            if begin == start:
                top = tl.max(tl.where(finite, key & 255, 0))
                base = tl.maximum(top + 2 - 31, 0)
            window = _count(bins, row, base, window, key, inside, value)
        begin += TILE

    zeros = tl.sum(seen & 1023).to(tl.int64)
    minus = tl.sum((seen >> 10) & 1023).to(tl.int64)
    nonfinite = tl.sum(seen >> 20).to(tl.int64)
    here = partial + chunk
    tl.store(here, tl.sum(total_sum))
    tl.store(here + total, tl.sum(squares))
    tl.store(here + 2 * total, tl.min(low))
    tl.store(here + 3 * total, tl.max(high))
    tl.store(here + 4 * total, zeros.to(tl.float64))
    tl.store(here + 5 * total, nonfinite.to(tl.float64))
    if HISTOGRAM:
        own = bins + row * 512
        slot = tl.arange(0, 64)
        place = ((slot >> 5) << 8) + base + (slot & 31)
        tl.atomic_add(own + place, window.to(tl.int64), mask=window > 0)
        tl.atomic_add(own, zeros - minus)
        tl.atomic_add(own + 256, minus)


@triton.jit
def _add_up(
    first, partial, moments, integers, total, rows,
    STEP: tl.constexpr,
):  # fmt: skip
    """One row: its chunks in a fixed order, so that the sums come out the same every time."""
    row = tl.program_id(0)
    start, end = tl.load(first + row), tl.load(first + row + 1)
    sums = tl.zeros([STEP], tl.float64)
    squares = tl.zeros([STEP], tl.float64)
    lows = tl.full([STEP], float("inf"), tl.float64)
    highs = tl.full([STEP], float("-inf"), tl.float64)
    zeros = tl.zeros([STEP], tl.float64)
    nonfinite = tl.zeros([STEP], tl.float64)
    begin = start
    while begin < end:
        at = begin + tl.arange(0, STEP)
        here, there = partial + at, at < end
        sums += tl.load(here, there, other=0.0)
        squares += tl.load(here + total, there, other=0.0)
        lows = tl.minimum(lows, tl.load(here + 2 * total, there, other=float("inf")))
        highs = tl.maximum(highs, tl.load(here + 3 * total, there, other=float("-inf")))
        zeros += tl.load(here + 4 * total, there, other=0.0)
        nonfinite += tl.load(here + 5 * total, there, other=0.0)
        begin += STEP
    low, high = tl.min(lows), tl.max(highs)
    out = moments + row
    tl.store(out, tl.sum(sums))
    tl.store(out + rows, tl.sum(squares))
    tl.store(out + 2 * rows, tl.maximum(tl.maximum(high, -low), 0.0))
    tl.store(out + 3 * rows, low + 0.0)
    tl.store(out + 4 * rows, high + 0.0)
    tl.store(integers + row, tl.sum(zeros).to(tl.int64))
    tl.store(integers + rows + row, tl.sum(nonfinite).to(tl.int64))
