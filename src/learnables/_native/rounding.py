"""Calls rounding.c: between bfloat16 and float32 and back, for many tensors on the CPU."""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from learnables._native import load

WIDEN, NARROW, STOCHASTIC = range(3)  # the order in rounding.c
AVX512, AVX2, BASELINE = 2, 1, 0
_PER_THREAD = 1 << 18  # numbers that are worth a thread of their own


@functools.cache
def available() -> tuple[bool, str]:
    """Whether the kernel is there, and the file it is in or why it is not."""
    library, why = load("rounding")
    return library is not None, why


def run_(
    operation: int,
    wide: Sequence[Tensor],
    narrow: Sequence[Tensor],
    lower: Sequence[Tensor | None],
    starts: Sequence[int] = (),
    seed: int = 0,
    *,
    threads: int,
    level: int = AVX512,
) -> None:
    """Fill ``wide`` (`WIDEN`), or ``narrow`` and ``lower`` (`NARROW`), or ``narrow``.

    Args:
        operation: `WIDEN`, `NARROW` or `STOCHASTIC`.
        wide: Float32 tensors without gaps.
        narrow: Bfloat16 tensors with the shapes and strides of ``wide``.
        lower: Int16 tensors likewise; None where there is nothing to add.
        starts: For `STOCHASTIC` the place of each tensor's first element in the noise, even.
        seed: Of the noise, 32 bits.
        threads: How many threads at most, this one included.
        level: The instruction set at most; for tests.
    """
    library, _ = load("rounding")
    assert library is not None
    rows = len(wide)
    pointers, numbers = ctypes.c_void_p * rows, ctypes.c_int64 * rows
    counts = [x.numel() for x in wide]
    library.learnables_rounding(
        ctypes.c_int(operation),
        ctypes.c_int64(rows),
        pointers(*[x.data_ptr() for x in wide]),
        pointers(*[x.data_ptr() for x in narrow]),
        pointers(*[None if x is None else x.data_ptr() for x in lower]),
        numbers(*counts),
        numbers(*(starts or [0] * rows)),
        ctypes.c_uint32(seed),
        ctypes.c_int(min(threads, 1 + sum(counts) // _PER_THREAD)),
        ctypes.c_int(level),
    )
    written: list[Tensor] = list(wide if operation == WIDEN else narrow)
    if operation == NARROW:
        written += [x for x in lower if x is not None]
    torch.autograd.graph.increment_version(written)
