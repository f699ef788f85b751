"""Calls statistics.c: one pass over many dense tensors on the CPU."""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from learnables._native import load

_KINDS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
DTYPES = frozenset(_KINDS)
"""What the kernel reads; the order in statistics.c."""


@functools.cache
def available() -> tuple[bool, str]:
    """Whether the kernel is there, and the file it is in or why it is not."""
    library, why = load("statistics")
    return library is not None, why


def run(
    tensors: Sequence[Tensor], histogram: bool, *, threads: int, baseline: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Look at one-dimensional contiguous CPU tensors of ``DTYPES``.

    Args:
        tensors: What to look at; nobody may write to them meanwhile.
        histogram: Whether to fill the third result.
        threads: How many threads at most, this one included.
        baseline: Leave the processor's vector extensions alone; for tests.

    Returns:
        Moments ``(5, rows)`` float64: sum, sum of squares, absmax, min, max; integers
        ``(2, rows)`` int64: zeros, non-finite; and the histogram ``(rows, 512)`` int64 or None.

    Raises:
        MemoryError: No memory for the work list.
    """
    library, _ = load("statistics")
    assert library is not None
    rows = len(tensors)
    moments = torch.empty(5, rows, dtype=torch.float64)
    integers = torch.empty(2, rows, dtype=torch.int64)
    bins = torch.zeros(rows, 512, dtype=torch.int64) if histogram else None
    failed = library.learnables_statistics(
        ctypes.c_int64(rows),
        (ctypes.c_void_p * rows)(*[x.data_ptr() for x in tensors]),
        (ctypes.c_int64 * rows)(*[x.numel() for x in tensors]),
        bytes([_KINDS[x.dtype] for x in tensors]),
        ctypes.c_void_p(moments.data_ptr()),
        ctypes.c_void_p(integers.data_ptr()),
        ctypes.c_void_p(bins.data_ptr() if bins is not None else None),
        ctypes.c_int(threads),
        ctypes.c_int(baseline),
    )
    if failed:
        raise MemoryError("no memory for the list of chunks")
    return moments, integers, bins
