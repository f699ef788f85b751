"""Every private or version-dependent torch name that we use, behind a plain one of ours."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import activation, batchnorm, conv, instancenorm, normalization, rnn
from torch.nn.modules import module as _module

NORMS = (
    normalization.LayerNorm,
    normalization.GroupNorm,
    normalization.RMSNorm,
    batchnorm._NormBase,
    instancenorm._InstanceNorm,
)
MATRIX_OWNERS = (
    nn.Linear,
    nn.Bilinear,
    conv._ConvNd,
    activation.MultiheadAttention,
    rnn.RNNBase,
    rnn.RNNCellBase,
)

WRAPPER_PREFIXES = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def on_parameter_registration(hook: Callable[[nn.Module, str, Any], Any]) -> Any:
    """Call ``hook(module, name, parameter)`` whenever any module registers a parameter."""
    return _module.register_module_parameter_registration_hook(hook)


def is_dtensor(x: object) -> bool:
    """Whether ``x`` is a DTensor; never imports torch.distributed where it is absent."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """The part of ``x`` that lies on this rank: its local tensor, or ``x`` itself."""
    if is_dtensor(x):
        part: Tensor = x.to_local()  # type: ignore[attr-defined]
        return part
    return x


def storage_key(x: Tensor) -> tuple[str, int]:
    """What two tensors share exactly when they share memory; fake storages get their identity."""
    x = local(x)
    if x.layout is not torch.strided:
        return (str(x.device), id(x))
    storage = x.untyped_storage()
    if x.device.type == "meta" or storage.data_ptr() == 0:
        return (str(x.device), storage._cdata)
    return (str(x.device), storage.data_ptr())


def without_wrappers(name: str) -> str:
    """``module._orig_mod.head.weight`` → ``head.weight``: the name the author wrote."""
    parts = name.split(".")
    return ".".join(p for p in parts[:-1] if p not in WRAPPER_PREFIXES) + (
        ("." if any(p not in WRAPPER_PREFIXES for p in parts[:-1]) else "") + parts[-1]
    )


def pull_together_(xs: Sequence[Tensor], to: Sequence[Tensor], rate: float | Tensor) -> None:
    """``x ← x + rate · (to − x)`` for all pairs in three multi-tensor operations."""
    away = torch._foreach_sub(list(to), list(xs))
    torch._foreach_mul_(away, rate)
    torch._foreach_add_(list(xs), away)


def from_rank_0(value: Tensor, like: Tensor) -> Tensor:
    """``value`` as rank 0 has it, in the dtype, on the device and with the sharding of ``like``.

    A collective call where a process group of several ranks exists: every rank must make it.
    """
    value = value.to(device=like.device, dtype=like.dtype)
    if is_dtensor(like):
        from torch.distributed.tensor import distribute_tensor

        sharded: Tensor = distribute_tensor(value, like.device_mesh, like.placements)  # type: ignore[attr-defined]
        return sharded
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.broadcast(value, src=0)
    return value


def gather(x: Tensor) -> Tensor:
    """The whole of a DTensor, as a collective call; any other tensor itself."""
    if is_dtensor(x):
        whole: Tensor = x.full_tensor()  # type: ignore[attr-defined]
        return whole
    return x


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which every rank holds whole, with the device and the sharding of a DTensor."""
    from torch.distributed.tensor import distribute_tensor

    sharded: Tensor = distribute_tensor(
        value.to(like.device),
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        src_data_rank=None,  # nothing to send
    )
    return sharded
