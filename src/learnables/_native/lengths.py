"""Calls lengths.c: rows of many tensors brought between two lengths, in place, on the CPU."""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from learnables._native import load

AVX512, AVX2, BASELINE = 2, 1, 0
_PER_THREAD = 1 << 18  # numbers that are worth a thread of their own


@functools.cache
def available() -> tuple[bool, str]:
    """Whether the kernel is there, and the file it is in or why it is not."""
    library, why = load("lengths")
    return library is not None, why


def run_(
    tensors: Sequence[Tensor], low: float, high: float, *, threads: int, level: int = AVX512
) -> Tensor:
    """Scale each row (last dimension) to the nearest length between ``low`` and ``high``.

    Args:
        tensors: Contiguous float32 tensors on the CPU with rows of one length.
        low: Shortest length; a zero row is left as it is.
        high: Longest length.
        threads: How many threads at most, this one included.
        level: The instruction set at most; for tests.

    Returns:
        A code for each row, one tensor after the other, uint8: 0, 1 for a row with NaN or
        infinity, 2 for a zero row that should be longer. Those are left as they are.
    """
    library, _ = load("lengths")
    assert library is not None
    width = tensors[0].shape[-1]
    counts = [x.numel() // width for x in tensors]
    codes = torch.empty(sum(counts), dtype=torch.uint8)
    library.learnables_lengths(
        ctypes.c_int64(len(counts)),
        (ctypes.c_void_p * len(counts))(*[x.data_ptr() for x in tensors]),
        (ctypes.c_int64 * len(counts))(*counts),
        ctypes.c_int64(width),
        ctypes.c_double(low),
        ctypes.c_double(high),
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_int(min(threads, 1 + len(codes) * width // _PER_THREAD)),
        ctypes.c_int(level),
    )
    torch.autograd.graph.increment_version(tensors)
    return codes
