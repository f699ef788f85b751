"""Calls block_sparse.c: the three products of a block-sparse matrix on the CPU."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from learnables._native import load

DTYPES = (torch.float32, torch.float64)
"""What the kernel computes in."""

AVX512, AVX2, BASELINE = 2, 1, 0
_PER_THREAD = 1 << 24  # multiplications that are worth a thread of their own


@functools.cache
def available() -> tuple[bool, str]:
    """Whether the kernel is there, and the file it is in or why it is not."""
    library, why = load("block_sparse")
    return library is not None, why


def product(
    x: Tensor, weight: Tensor, index: Any, bias: Tensor | None, out_features: int, level: int = 2
) -> Tensor | None:
    """X · Wᵀ + bias; None where the index describes no matrix of this size."""
    y = x.new_empty(x.shape[0], out_features)
    sizes = (x.shape[0], out_features, x.shape[1])
    return y if _run(0, level, sizes, weight.shape, index, x, weight, bias, y) else None


def transposed_product(
    g: Tensor, weight: Tensor, index: Any, in_features: int, level: int = 2
) -> Tensor | None:
    """G · W; None where the index describes no matrix of this size."""
    gx = g.new_empty(g.shape[0], in_features)
    sizes = (g.shape[0], g.shape[1], in_features)
    return gx if _run(1, level, sizes, weight.shape, index, g, weight, None, gx) else None


def sampled_product(
    g: Tensor, x: Tensor, index: Any, block: tuple[int, int], level: int = 2
) -> Tensor | None:
    """gᵀ · x at the stored blocks; None where the index describes no matrix of this size."""
    weight = x.new_empty(index.columns.numel(), *block)
    sizes = (x.shape[0], g.shape[1], x.shape[1])
    return weight if _run(2, level, sizes, weight.shape, index, g, x, None, weight) else None


def _run(
    which: int,
    level: int,
    sizes: tuple[int, int, int],
    blocks: torch.Size,
    index: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> bool:
    """Whether it was done. The caller has seen to dtypes, devices and shapes but for the index."""
    library, _ = load("block_sparse")
    assert library is not None
    E, p, q = blocks
    R, C = -(-sizes[1] // p), -(-sizes[2] // q)
    if [len(part) for part in index] != [R + 1, E, C + 1, E, E]:
        return False
    index = [part.contiguous() for part in index]
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    work = sizes[0] * E * p * q
    threads = max(1, min(torch.get_num_threads(), work // _PER_THREAD))
    long = ctypes.c_int64
    pointers = [*index, x, weight, bias, y]
    failed = library.learnables_block_sparse(
        which,
        int(x.dtype == torch.float64),
        level,
        threads,
        *(long(size) for size in (*sizes, p, q, E)),
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in pointers),
    )
    return not failed
