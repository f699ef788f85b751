"""Who computes the block-sparse products: plain torch or a native kernel, by device and dtype."""

import functools
import logging
import os
from typing import NamedTuple

import torch
from torch import Tensor

from learnables._native import block_sparse as native
from learnables.errors import LayoutError, LearnablesError
from learnables.sparse import reference
from learnables.sparse.layout import Index
from learnables.sparse.plan import plan_of

FORCE = "LEARNABLES_SPARSE"
"""Environment variable that forces one backend: ``torch`` or ``native``."""

BACKENDS = ("torch", "native")
_log = logging.getLogger("learnables.sparse")


class Backend(NamedTuple):
    """Who computes, and why."""

    name: str
    why: str


def backend(x: Tensor | None = None) -> Backend:
    """Which backend computes products with ``x`` (a float32 CPU tensor when None), and why.

    ``native`` needs the built kernel, a CPU and a floating dtype; ``torch`` is always there. The
    environment variable ``LEARNABLES_SPARSE`` forces one of them. The logger ``learnables.sparse``
    is told once for each dtype and device: a warning where the native kernel was not built.

    Raises:
        LearnablesError: The environment forces a backend that is unknown, not there, or cannot
            compute in this dtype on this device.

    Example:
        >>> backend(torch.zeros(2, dtype=torch.int32))
        Backend(name='torch', why='dtype torch.int32')
    """
    device, dtype = ("cpu", torch.float32) if x is None else (x.device.type, x.dtype)
    return _backend(device, dtype, os.environ.get(FORCE))


@functools.cache  # so each choice is made, and logged, once
def _backend(device: str, dtype: torch.dtype, forced: str | None) -> Backend:
    if forced not in (None, "", *BACKENDS):
        raise LearnablesError(
            "the environment forces a backend that does not exist",
            found=f"{FORCE}={forced}",
            wanted=" or ".join(BACKENDS),
        )
    chosen = _choose(device, dtype, forced)
    if forced == "native" and chosen.name != "native":
        raise LearnablesError(
            "the environment forces a backend that cannot do it",
            found=f"{FORCE}=native, {chosen.why}",
            wanted="the built kernel, a CPU, a floating dtype",
            mend=f"unset {FORCE}",
        )
    missed = chosen.name == "torch" and not forced and device == "cpu" and dtype in native.DTYPES
    level = logging.WARNING if missed else logging.INFO
    _log.log(level, "block-sparse products of %s on %s: %s (%s)", dtype, device, *chosen)
    return chosen


def _choose(device: str, dtype: torch.dtype, forced: str | None) -> Backend:
    if forced == "torch":
        return Backend("torch", f"{FORCE}=torch")
    if device != "cpu":
        return Backend("torch", f"device {device}")
    if dtype not in native.DTYPES:
        return Backend("torch", f"dtype {dtype}")
    there, why = native.available()
    return Backend("native" if there else "torch", why)


def product(
    x: Tensor, weight: Tensor, index: Index, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """X · Wᵀ + bias: (B, I) → (B, O)."""
    if backend(x).name == "native":
        y = native.product(x, weight, index, bias, out_features)
        return _checked(y, index)
    return reference.product(x, weight, index, out_features, bias)


def transposed_product(g: Tensor, weight: Tensor, index: Index, in_features: int) -> Tensor:
    """G · W: (B, O) → (B, I)."""
    if backend(g).name == "native":
        return _checked(native.transposed_product(g, weight, index, in_features), index)
    return reference.transposed_product(g, weight, index, in_features)


def sampled_product(g: Tensor, x: Tensor, index: Index, block: tuple[int, int]) -> Tensor:
    """gᵀ · x at the stored blocks: (B, O), (B, I) → (E, p, q)."""
    if backend(x).name == "native":
        return _checked(native.sampled_product(g, x, index, block), index)
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
        "the index by columns does not describe the blocks that the index by rows lists",
        found="column_starts, rows or order out of range",
        wanted="those of one layout",
        mend="layer.load_state_dict(...), or layer.rewire(mask), writes them anew",
    )
