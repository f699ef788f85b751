"""Strides: which a layout asks for, and what is odd about those a tensor has."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

Strides: TypeAlias = tuple[int, ...]

_FORMATS = {
    torch.contiguous_format: None,
    torch.channels_last: 4,
    torch.channels_last_3d: 5,
}
NAMES = {
    torch.contiguous_format: "row-major",
    torch.channels_last: "channels last",
    torch.channels_last_3d: "channels last",
}
"""Layout → how messages call it."""


def fits(ndim: int, memory_format: torch.memory_format) -> bool:
    """Whether a tensor of so many dimensions can be laid out like that."""
    return memory_format in _FORMATS and _FORMATS[memory_format] in (None, ndim)


def wanted_strides(
    shape: Sequence[int], memory_format: torch.memory_format = torch.contiguous_format
) -> Strides:
    """The strides that torch gives a new tensor, those of dimensions of size 1 included.

    Example:
        >>> wanted_strides((8, 3, 5, 5)), wanted_strides((8, 3, 5, 5), torch.channels_last)
        ((75, 25, 5, 1), (75, 1, 15, 3))
    """
    order = list(range(len(shape)))
    smallest = 1
    if _FORMATS[memory_format] is not None:
        order = [0, *order[2:], 1]
        smallest = 0  # which makes no difference to any element, but torch does it so
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], smallest)
    return tuple(strides)


def usual_strides(shape: Sequence[int]) -> list[Strides]:
    """The strides of every layout that a tensor of this shape can have."""
    return [wanted_strides(shape, f) for f in _FORMATS if fits(len(shape), f)]


def laid_out(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """``x`` with exactly the strides of its layout: itself, or a copy in memory of its own.

    ``x.contiguous()`` is not enough: it returns ``x`` where only a dimension of size 1 is odd.
    """
    wanted = wanted_strides(x.shape, memory_format)
    return x if x.stride() == wanted else with_strides(x, wanted)


def with_strides(x: Tensor, strides: Sequence[int]) -> Tensor:
    """A copy of ``x``, without a graph, that has these strides."""
    made = torch.empty_strided(x.shape, tuple(strides), dtype=x.dtype, device=x.device)
    return made.copy_(x.detach())


def like(x: Tensor, other: Tensor) -> Tensor:
    """``x`` in the strides of ``other``, which has its shape: itself, or a copy."""
    return x if x.stride() == other.stride() else with_strides(x, other.stride())


def lay_out_(param: nn.Parameter, strides: Sequence[int]) -> None:
    """Give a Parameter and its gradient other strides; both stay the same objects."""
    if param.stride() != tuple(strides):
        param.data = with_strides(param, strides)
    if param.grad is not None and param.grad.stride() != tuple(strides):
        # not param.grad = …: whoever holds this gradient goes on holding it
        param.grad.data = with_strides(param.grad, strides)


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements are the same memory, as `expand` makes it.

    Exact where the strides nest, as those of all views by slicing and transposing do; of other
    tensors it is found by counting.
    """
    dims = _real_dims(x.shape, x.stride())
    reach = 0  # of all dimensions with smaller strides
    for size, stride in dims:
        if stride <= reach:
            return _counted_overlap(dims)
        reach += (size - 1) * stride
    return False


def _counted_overlap(dims: list[tuple[int, int]]) -> bool:
    if any(stride == 0 for _, stride in dims):
        return True
    reach = sum((size - 1) * stride for size, stride in dims)
    if reach + 1 < torch.Size([size for size, _ in dims]).numel():
        return True  # more elements than places
    at = torch.zeros(1, dtype=torch.int64)
    for size, stride in dims:
        at = (at[:, None] + torch.arange(size) * stride).reshape(-1)
    return int(torch.unique(at).numel()) < at.numel()


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill one block without gaps, in any order of dimensions."""
    return (
        x.is_contiguous()
        or not x.numel()
        or (_reach(x) + 1 == x.numel() and not overlaps_itself(x))
    )


def has_other_order(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape walk memory in different orders."""
    if x.stride() == other.stride():
        return False
    pairs = zip(x.shape, x.stride(), other.stride(), strict=True)
    return any(size > 1 and a != b for size, a, b in pairs)


def format_of(x: Tensor) -> torch.memory_format | None:
    """The layout whose order ``x`` has, whatever the strides of dimensions of size 1."""
    for memory_format in _FORMATS:
        if fits(x.ndim, memory_format):
            wanted = wanted_strides(x.shape, memory_format)
            pairs = zip(x.shape, x.stride(), wanted, strict=True)
            if all(size == 1 or a == b for size, a, b in pairs) or not x.numel():
                return memory_format
    return None


def share_an_element(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common.

    Views of one dtype are compared element by element, but only where their ranges meet; views of
    different dtypes count as sharing where the ranges do.
    """
    (a, b), (c, d) = _bytes(x), _bytes(other)
    if b <= c or d <= a:
        return False
    if x.element_size() != other.element_size() or not (x.numel() and other.numel()):
        return bool(x.numel() and other.numel())
    return bool(torch.isin(_places(x), _places(other)).any())


def _places(x: Tensor) -> Tensor:
    at = torch.full((1,), int(x.storage_offset()), dtype=torch.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        at = (at[:, None] + torch.arange(size) * stride).reshape(-1)
    return at


def _bytes(x: Tensor) -> tuple[int, int]:
    start = int(x.storage_offset()) * x.element_size()
    return start, start + (_reach(x) + 1) * x.element_size()


def _reach(x: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _real_dims(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Size and stride of the dimensions that have more than one element, the nearest first."""
    if 0 in shape:
        return []
    dims = [(n, s) for n, s in zip(shape, strides, strict=True) if n > 1]
    return sorted(dims, key=lambda dim: dim[1])
