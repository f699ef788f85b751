"""Calls orthonormal.c: many matrices back to orthonormal columns, in place, on the CPU."""

import ctypes
import functools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from learnables._native import load

AVX512_BF16, AVX512, AVX2, BASELINE = 3, 2, 1, 0
FAR = 4
"""Code of a matrix that was left alone, because it needs a decomposition."""
LARGEST = 1 << 21
"""Numbers in the largest matrix it is made for; its working memory is a few times that."""

_scratch = threading.local()  # pages that are had once, not in every call


@functools.cache
def available() -> tuple[bool, str]:
    """Whether the kernel is there, and the file it is in or why it is not."""
    library, why = load("orthonormal")
    if library is None:
        return False, why
    if not hasattr(library, "learnables_orthonormal_tangent"):  # a checkout that moved on
        return False, f"{why} was built from an older orthonormal.c"
    library.learnables_orthonormal_room.restype = ctypes.c_int64
    return True, why


def run_(
    tensors: Sequence[Tensor],
    *,
    near: float,
    attainable: float,
    goal: float,
    threads: int,
    level: int = AVX512_BF16,
) -> Tensor:
    """Bring each matrix (last two dimensions) to the nearest with orthonormal columns or rows.

    Args:
        tensors: Contiguous float32 tensors on the CPU with matrices of one shape.
        near: ``‖E‖`` of the residual from which a matrix is left alone, with the code `FAR`.
        attainable: What rounding leaves of ``‖E‖``.
        goal: What may be left of it.
        threads: How many threads at most, this one included.
        level: The instruction set at most; for tests.

    Returns:
        A code for each matrix, one tensor after the other, uint8: 0, 1 for a matrix with NaN or
        infinity, or `FAR`. Those are left as they are.
    """
    library, _ = load("orthonormal")
    assert library is not None
    sizes, pointers = _sizes(tensors), _pointers(tensors)
    threads = max(1, min(threads, len(pointers)))
    codes = torch.empty(len(pointers), dtype=torch.uint8)
    library.learnables_orthonormal(
        ctypes.c_int64(len(pointers)),
        pointers,
        *sizes,
        ctypes.c_void_p(_room(threads * library.learnables_orthonormal_room(*sizes)).data_ptr()),
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_double(near),
        ctypes.c_double(attainable),
        ctypes.c_double(goal),
        ctypes.c_int(threads),
        ctypes.c_int(level),
    )
    torch.autograd.graph.increment_version(tensors)
    return codes


def to_tangent_(
    tensors: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    threads: int,
    level: int = AVX512_BF16,
) -> None:
    """Take the part across the set out of each gradient: ``G − W sym(WᵀG)``, in place.

    Args:
        tensors: What `run_` takes; only read.
        gradients: As many of the same shapes, which are changed.
        threads: How many threads at most, this one included.
        level: The instruction set at most; for tests.
    """
    library, _ = load("orthonormal")
    assert library is not None
    sizes, pointers = _sizes(tensors), _pointers(tensors)
    threads = max(1, min(threads, len(pointers)))
    library.learnables_orthonormal_tangent(
        ctypes.c_int64(len(pointers)),
        pointers,
        _pointers(gradients),
        *sizes,
        ctypes.c_void_p(_room(threads * library.learnables_orthonormal_room(*sizes)).data_ptr()),
        ctypes.c_int(threads),
        ctypes.c_int(level),
    )
    torch.autograd.graph.increment_version(gradients)


def _sizes(tensors: Sequence[Tensor]) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    n, k = tensors[0].shape[-2:]
    return ctypes.c_int64(n), ctypes.c_int64(k)


def _pointers(tensors: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    """Where each matrix of each tensor begins."""
    n, k = tensors[0].shape[-2:]
    found: list[int] = []
    for x in tensors:
        first = x.data_ptr()
        found += range(first, first + 4 * x.numel(), 4 * n * k) if x.ndim > 2 else [first]
    return (ctypes.c_void_p * len(found))(*found)


def _room(size: int) -> Tensor:
    """At least ``size`` floats that nobody else uses while this thread is here."""
    kept: Tensor | None = getattr(_scratch, "kept", None)
    if kept is None or kept.numel() < size:
        kept = _scratch.kept = torch.empty(size, dtype=torch.float32)
    return kept
