"""The memory of parameters, their gradients and their optimizer state, laid out as declared."""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import ddp_parameters, is_dtensor, is_uninitialised, storage_key
from learnables.arguments import as_annotated, optimizers_in
from learnables.entries import Entry, entries
from learnables.errors import LearnablesError
from learnables.notes import notes_of
from learnables.strides import (
    NAMES,
    Strides,
    fits,
    is_dense,
    lay_out_,
    like,
    share_an_element,
    wanted_strides,
)

Undeclared = Literal["row-major", "dense"]


@as_annotated
def canonicalize_(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    undeclared: Undeclared = "row-major",
    separate: bool = False,
) -> list[str]:
    """Names of the parameters whose memory was laid out anew, in the order of ``named_parameters``.

    A parameter gets the layout that was declared for it (``ln.parameter(memory_format=…)``), every
    other one becomes dense and row-major, also along dimensions of size 1; its gradient and its
    optimizer state get the same strides. The Parameter objects stay, so optimizers, ties and hooks
    go on working; the values stay bit for bit. Fused CPU optimizers walk memory and ignore strides:
    where one of these tensors differs, they compute something else, silently.

    Args:
        model: A module on one process, not yet wrapped: DDP and FSDP2 have copied the layouts.
        optimizer: The optimizer, or all of them, whose state is laid out too.
        undeclared: ``"dense"`` leaves undeclared parameters whose elements fill one block in any
            order, such as channels-last convolutions, and lays only gradients and state out
            like them.
        separate: Whether a parameter that has to be moved may lose elements that it shares with
            another tensor of the model. One that only lies in the same storage, like the third of a
            split matrix, shares no element and is moved anyway.

    Returns:
        A parameter is named where it, its gradient or its state was moved; an empty list says that
        nothing was wrong.

    Raises:
        LearnablesError: A parameter has no memory (meta device, lazy), is sharded, is held by DDP
            and would have to be moved, or shares elements with another tensor. Nothing is changed
            then.

    Example:
        >>> layer = nn.Linear(2, 3, bias=False)
        >>> layer.weight.data = torch.zeros(2, 3).t()
        >>> canonicalize_(layer)
        ['weight']
        >>> layer.weight.stride()
        (2, 1)

    Cost:
        One copy of each tensor that is moved; nothing for the others. A compiled model is compiled
        once more where a parameter was.
    """
    if undeclared not in get_args(Undeclared):
        raise LearnablesError(
            "there is no such layout for undeclared parameters",
            found=repr(undeclared),
            wanted=" or ".join(map(repr, get_args(Undeclared))),
        )
    optimizers = optimizers_in(optimizer)
    walk = [entry for entry in entries(model) if _is_ours(entry)]
    wanted = {entry: _wanted(entry, undeclared) for entry in walk}
    moving = [entry for entry in walk if entry.param.stride() != wanted[entry]]
    _refuse_wrapped(model, moving)
    if not separate:
        _refuse_shared(model, moving)
    moved = []
    for entry in walk:
        param, strides = entry.param, wanted[entry]
        grad = param.grad
        odd = param.stride() != strides
        if grad is not None and grad.layout is torch.strided:
            odd |= grad.stride() != strides
        if odd:
            lay_out_(param, strides)
        # a list, not any, which would stop at the first: every state has to be visited
        if any([odd, *[lay_out_state_(o, param) for o in optimizers]]):
            moved.append(entry.name)
    return moved


def declared_layout(entry: Entry) -> torch.memory_format | None:
    """The layout that was declared for a parameter, where it can have it."""
    for place in entry.places:
        note = notes_of(place.owner).get(place.local_name)
        found: torch.memory_format | None = None if note is None else note.get("memory_format")
        if found is not None:
            return found if fits(len(entry.shape), found) else None
    return None


def name_of(memory_format: torch.memory_format | None) -> str:
    """What messages call a layout."""
    return "none that has a name" if memory_format is None else NAMES[memory_format]


def _is_ours(entry: Entry) -> bool:
    """Whether it has strides that somebody could change.

    Raises:
        LearnablesError: It has no memory yet, or only a part of it lies here.
    """
    param = entry.param
    if is_uninitialised(param) or param.device.type == "meta":
        raise LearnablesError(
            "a parameter has no memory that could be laid out",
            where=entry.name,
            found="a lazy parameter" if is_uninitialised(param) else "device meta",
            wanted="an initialised model",
            mend="model.to_empty(device='cpu'); ln.init.reset_(model)",
        )
    if is_dtensor(param):
        raise LearnablesError(
            "a sharded parameter cannot be laid out anew: the shards lie as they were cut",
            where=entry.name,
            found=f"{entry.looks}, placements {param.placements}",  # type: ignore[attr-defined]
            wanted="a model that is laid out before it is sharded, as ln.prepare does it",
            mend="ln.prepare(model, optimizer_fn, 'fsdp2')",
        )
    return param.layout is torch.strided and not param.is_quantized


def _wanted(entry: Entry, undeclared: Undeclared) -> Strides:
    param, declared = entry.param, declared_layout(entry)
    if declared is None and undeclared == "dense" and is_dense(param):
        return tuple(param.stride())
    return wanted_strides(param.shape, declared or torch.contiguous_format)


def lay_out_state_(optimizer: Optimizer, param: nn.Parameter) -> bool:
    """Whether state of the parameter's shape had other strides; new tensors take its place.

    In place would also reach the state dict that the optimizer was loaded from.
    """
    state = optimizer.state.get(param, {})
    odd = {
        key: like(x, param)
        for key, x in state.items()
        if isinstance(x, Tensor)
        and x.layout is torch.strided
        and x.shape == param.shape
        and x.stride() != param.stride()
    }
    state.update(odd)
    return bool(odd)


def _refuse_wrapped(model: nn.Module, moving: Sequence[Entry]) -> None:
    held = {id(p) for module in model.modules() for p in ddp_parameters(module) or ()}
    inside = [entry for entry in moving if id(entry.param) in held]
    if inside:
        raise LearnablesError(
            "DDP has made its buckets for the layout that the parameter has",
            where=", ".join(entry.name for entry in inside),
            found=f"strides {tuple(inside[0].param.stride())} inside DistributedDataParallel",
            wanted="a model that is laid out before it is wrapped",
            mend="ln.prepare(model, optimizer_fn, 'ddp')",
        )


def _refuse_shared(model: nn.Module, moving: Sequence[Entry]) -> None:
    storages = {entry.storage for entry in moving}
    lodgers: dict[tuple[str, int], list[tuple[str, Tensor]]] = {}
    for name, x in _tensors(model):
        if storage_key(x) in storages:
            lodgers.setdefault(storage_key(x), []).append((name, x))
    for entry in moving:
        for name, other in lodgers[entry.storage]:
            if other is entry.param or not share_an_element(entry.param, other):
                continue
            raise LearnablesError(
                "a parameter shares elements with another tensor, and would not after the move",
                where=f"{entry.name}, {name}",
                found=f"strides {tuple(entry.param.stride())} and {tuple(other.stride())} in one "
                "storage",
                wanted="memory of its own, or one Parameter under both names",
                mend=_tie(entry, name, other) or "ln.canonicalize_(model, separate=True)",
            )


def _tie(entry: Entry, name: str, other: Tensor) -> str:
    """The call that makes one Parameter of two that are one matrix, or its transpose."""
    param = entry.param
    if not isinstance(other, nn.Parameter) or param.storage_offset() != other.storage_offset():
        return ""
    mine, theirs = (param.shape, param.stride()), (other.shape, other.stride())
    if mine == theirs:
        return f"ln.tie(model, {entry.name!r}, {name!r})"
    if param.ndim == 2 and mine == (other.mT.shape, other.mT.stride()):
        return f"ln.tie(model, {entry.name!r}, {name!r}, transpose=True)"
    return ""


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of a model, and the tensors in plain attributes of its modules."""
    yield from model.named_parameters()
    for name, x in model.named_buffers():
        if x.layout is torch.strided:
            yield name, x
    for path, module in model.named_modules():
        for key, x in vars(module).items():
            if isinstance(x, Tensor) and x.layout is torch.strided:
                yield f"{path}.{key}" if path else key, x
