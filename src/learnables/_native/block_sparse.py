"""Calls block_sparse.c: the three products of a block-sparse matrix on the CPU."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from learnables._native import load

_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}  # the order in block_sparse.c
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What the kernel computes in; half precision that the processor lacks, in float32."""

AVX512, AVX2, BASELINE = 2, 1, 0
_NO_KERNEL = 2  # what the library answers where the processor cannot multiply bfloat16
_FEW = 8  # samples up to which turning blocks of bfloat16 costs more than multiplying them
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
    sizes = (x.shape[0], out_features, x.shape[1])
    shape = (x.shape[0], out_features)
    return _run(0, level, sizes, weight.shape, index, x, weight, bias, shape)


def transposed_product(
    g: Tensor, weight: Tensor, index: Any, in_features: int, level: int = 2
) -> Tensor | None:
    """G · W; None where the index describes no matrix of this size."""
    sizes = (g.shape[0], g.shape[1], in_features)
    shape = (g.shape[0], in_features)
    return _run(1, level, sizes, weight.shape, index, g, weight, None, shape)


def sampled_product(
    g: Tensor, x: Tensor, index: Any, block: tuple[int, int], level: int = 2
) -> Tensor | None:
    """gᵀ · x at the stored blocks; None where the index describes no matrix of this size."""
    sizes = (x.shape[0], g.shape[1], x.shape[1])
    blocks = (index.columns.numel(), *block)
    return _run(2, level, sizes, blocks, index, g, x, None, blocks)


def _run(
    which: int,
    level: int,
    sizes: tuple[int, int, int],
    blocks: tuple[int, ...],
    index: Any,
    x: Tensor,
    other: Tensor,
    bias: Tensor | None,
    shape: tuple[int, ...],
) -> Tensor | None:
    """The result; None for a bad index. The caller saw to dtypes, devices, all other shapes."""
    (samples, out, in_features), (E, p, q) = sizes, blocks
    R, C = -(-out // p), -(-in_features // q)
    if [part.numel() for part in index] != [R + 1, E, C + 1, E, E]:
        return None
    dtype = x.dtype
    x, other = _readable(x), _readable(other)
    bias = None if bias is None else _readable(bias)
    threads = max(1, min(torch.get_num_threads(), samples * E * p * q // _PER_THREAD))
    index = [part.contiguous() for part in index]
    places = [part.data_ptr() for part in index]

    def call(x: Tensor, other: Tensor, bias: Tensor | None) -> tuple[int, Tensor]:
        y = x.new_empty(shape)
        start = None if bias is None else bias.data_ptr()
        pointers = (*places, x.data_ptr(), other.data_ptr(), start, y.data_ptr())
        code: int = _entry()(which, _KINDS[x.dtype], level, threads, *sizes, p, q, E, *pointers)
        return code, y

    if dtype in (torch.float32, torch.float64):
        code, y = call(x, other, bias)
    else:
        code, y = _NO_KERNEL, x
        even = not any(size % 2 for size in (out, in_features, p, q))
        if dtype == torch.bfloat16 and even and (which != 0 or samples > _FEW):
            code, y = call(x, other, bias)
        if code == _NO_KERNEL:
            code, y = call(x.float(), other.float(), None if bias is None else bias.float())
            y = y.to(dtype)
    return None if code else y


@functools.cache
def _entry() -> Any:
    """The C function, told once what it takes: plain numbers then need no boxes."""
    library, _ = load("block_sparse")
    assert library is not None
    function = library.learnables_block_sparse
    function.argtypes = [ctypes.c_int] * 4 + [ctypes.c_int64] * 6 + [ctypes.c_void_p] * 9
    return function


def _readable(x: Tensor) -> Tensor:
    """``x`` in one piece, halves in whole pairs of them."""
    x = x.contiguous()
    return x if x.data_ptr() % 4 == 0 or x.itemsize != 2 else x.clone()
