"""Who computes the block-sparse products: native code, Triton or plain torch."""

import functools
import logging
import os
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnables._native import block_sparse as native
from learnables.errors import LayoutError, LearnablesError
from learnables.sparse import reference
from learnables.sparse.layout import Index
from learnables.sparse.plan import plan_of

FORCE = "LEARNABLES_SPARSE"
"""Environment variable that forces one backend: ``torch``, ``native`` or ``triton``."""

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_log = logging.getLogger("learnables.sparse")


class Backend(NamedTuple):
    """Who computes, and why."""

    name: str
    why: str


def backend(x: Tensor | None = None) -> Backend:
    """Which backend computes products with ``x`` (a float32 CPU tensor when None), and why.

    ``native`` needs the built kernel, a CPU and a floating dtype; ``triton`` a GPU, Triton, which
    comes with CUDA builds of torch, and blocks of multiples of 16; ``torch`` is always there. The
    environment variable ``LEARNABLES_SPARSE`` forces one for the dtypes that it can compute in.
    The logger ``learnables.sparse`` is told once for each dtype and device, with a warning where
    a kernel for it was not built or cannot run.

    Raises:
        LearnablesError: The environment forces a backend that is unknown or not there.

    Example:
        >>> backend(torch.zeros(2, dtype=torch.int32))
        Backend(name='torch', why='dtype torch.int32')
    """
    x = torch.empty(0) if x is None else x
    return _backend(x.device, x.dtype, os.environ.get(FORCE))


@functools.cache  # so each choice is made, and logged, once
def _backend(device: torch.device, dtype: torch.dtype, forced: str | None) -> Backend:
    chosen = _choose(device, dtype, forced or None)
    missed = chosen.name == "torch" and not forced and dtype in _TRITON_DTYPES
    level = logging.WARNING if missed else logging.INFO
    _log.log(level, "block-sparse products of %s on %s: %s (%s)", dtype, device, *chosen)
    return chosen


def _choose(device: torch.device, dtype: torch.dtype, forced: str | None) -> Backend:
    name = forced or ("native" if device.type == "cpu" else "triton")
    if name == "native":
        known, wanted = dtype in native.DTYPES, "the built kernel, and a CPU"
        there, why = native.available() if device.type == "cpu" else (False, f"device {device}")
    elif name == "triton":
        known, wanted = dtype in _TRITON_DTYPES, "a GPU, or TRITON_INTERPRET=1"
        there, why = _triton_available(device)
    elif name == "torch":
        return Backend("torch", f"{FORCE}=torch")
    else:
        raise LearnablesError(
            "no backend has this name",
            found=f"{FORCE}={forced}",
            wanted="torch, native or triton",
            mend=f"unset {FORCE}",
        )
    if not known:
        return Backend("torch", f"dtype {dtype}")
    if forced and not there:
        raise LearnablesError(
            f"the {forced} backend is forced, and cannot compute here",
            found=why,
            wanted=wanted,
            mend=f"unset {FORCE}",
        )
    return Backend(name if there else "torch", why)


def _triton() -> Any:
    return import_module("learnables._native.block_sparse_triton")


def _triton_available(device: torch.device) -> tuple[bool, str]:
    try:
        there: tuple[bool, str] = _triton().available(device)
    except ImportError as error:
        return False, str(error)
    return there


def _runs_triton(x: Tensor, block: tuple[int, int]) -> bool:
    return backend(x).name == "triton" and bool(_triton().fits(block))


def product(
    x: Tensor, weight: Tensor, index: Index, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """X · Wᵀ + bias: (B, I) → (B, O)."""
    if backend(x).name == "native":
        return _checked(native.product(x, weight, index, bias, out_features), index)
    if _runs_triton(x, (weight.shape[1], weight.shape[2])):
        plan_of(index)  # checks it
        y: Tensor = _triton().product(x, weight, index, bias, out_features)
        return y
    return reference.product(x, weight, index, out_features, bias)


def transposed_product(g: Tensor, weight: Tensor, index: Index, in_features: int) -> Tensor:
    """G · W: (B, O) → (B, I)."""
    if backend(g).name == "native":
        return _checked(native.transposed_product(g, weight, index, in_features), index)
    if _runs_triton(g, (weight.shape[1], weight.shape[2])):
        plan_of(index)
        gx: Tensor = _triton().transposed_product(g, weight, index, in_features)
        return gx
    return reference.transposed_product(g, weight, index, in_features)


def sampled_product(g: Tensor, x: Tensor, index: Index, block: tuple[int, int]) -> Tensor:
    """gᵀ · x at the stored blocks: (B, O), (B, I) → (E, p, q)."""
    if backend(x).name == "native":
        return _checked(native.sampled_product(g, x, index, block), index)
    if _runs_triton(x, block):
        row_of = plan_of(index).row_of
        weight: Tensor = _triton().sampled_product(g, x, index, row_of, block)
        return weight
    return reference.sampled_product(g, x, index, block)


def _checked(result: Tensor | None, index: Index) -> Tensor:
    """The result of a native kernel, which gives none for an index that it cannot follow.

    Raises:
        LayoutError: There is none.
    """
    if result is not None:
        return result
    plan_of(index)  # raises, with the reason
    raise LayoutError(
        "the index describes a matrix of another size",
        found=f"{len(index.row_starts) - 1} × {len(index.column_starts) - 1} blocks",
        wanted="as many as cover the input, the output and the weight",
        mend="layer.load_state_dict(...), or layer.rewire(mask), writes it anew",
    )
