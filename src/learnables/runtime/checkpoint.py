"""Save everything that training needs to go on, in one file, atomically; load it by name.

The file is plain safetensors: the model's tensors under their own names, so that any tool reads
them, and everything else under names that begin with ``learnables/``. What is no tensor is JSON in
the header. Nothing is pickled, and every part has a checksum.
"""

import json
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import distribute_like, gather, is_dtensor, storage_key, without_wrappers
from learnables.entries import Entry, entries
from learnables.errors import CheckpointError, LearnablesError, warn
from learnables.notes import note_of, put_note
from learnables.policy.attach import attach, attachment_of
from learnables.runtime.atomic import replace_file
from learnables.runtime.plain import flatten, unflatten

FORMAT = 1
_OURS = "learnables/"
_SHOWN = 40  # how many names an error message lists
# How a step is computed, not what it computes: the optimizer that loads keeps its own choice.
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")


class Stateful(Protocol):
    """Anything with ``state_dict`` and ``load_state_dict``: a scheduler, a scaler, an EMA model."""

    def state_dict(self) -> Any:
        """The state as plain data and tensors."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take over such a state."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, read whole and verified.

    Attributes:
        path: The file.
        step: The step it was saved at, or None.
        extra: What the caller added.
        model: The model's state dict; a tied tensor stands under each of its names.
        meta: Everything else, as plain data with tensors in it.
    """

    path: Path
    step: int | None
    extra: dict[str, Any]
    model: dict[str, Any]
    meta: dict[str, Any]

    @property
    def ties(self) -> dict[str, str]:
        """Name → the name of the tensor that it shared when it was saved."""
        ties: dict[str, str] = self.meta["model"]["ties"]
        return ties


# --- save --------------------------------------------------------------------------------------


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] = (),
    *,
    also: Mapping[str, Stateful] | None = None,
    step: int | None = None,
    extra: Mapping[str, Any] | None = None,
    random_state: bool = True,
) -> Path:
    """Write a checkpoint that replaces ``path`` as a whole or not at all.

    Optimizer state is kept by parameter *name*, so it fits a model whose parameters stand in
    another order. A tied parameter is written once. Names are those of the bare model, without what
    DDP, FSDP2 and ``torch.compile`` put in front. The values that parameters decay toward are kept.

    Args:
        path: The file; ``.safetensors`` by convention. Its folder is made.
        model: The model, bare or wrapped.
        optimizer: Its optimizer, or several in a fixed order.
        also: Name → scheduler, ``GradScaler``, EMA model, or whatever else has a ``state_dict``.
        step: How far training is.
        extra: Plain data of your own: numbers, strings, tensors, and dicts and lists of them.
        random_state: Whether to keep the random states of torch (CPU and CUDA), numpy and Python.

    Returns:
        The path.

    Raises:
        CheckpointError: The disk is full, the folder cannot be written, or a state holds what
            could only be pickled. An older file at ``path`` is untouched then.

    Example:
        >>> import tempfile, pathlib
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "last.safetensors"
        >>> _ = ln.save_checkpoint(path, model, optimizer, step=7)
        >>> ln.load_checkpoint(path, model, optimizer).step
        7

    Cost:
        Time of writing the bytes to the disk, with fsync; memory of one copy in host memory of
        whatever does not lie there contiguously. In several processes rank 0 writes and the others
        return at once, except that the parts of DTensors are gathered: then all ranks must call.
    """
    path = Path(path)
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    pile = _Pile()
    meta: dict[str, Any] = {
        "format": FORMAT,
        "torch": torch.__version__,
        "step": step,
        "model": _write_model(model, pile),
        "initial": _write_initial(model, pile),
        "optimizers": [
            _write_optimizer(opt, model, pile, f"{_OURS}optimizer/{i}")
            for i, opt in enumerate(optimizers)
        ],
        "also": {
            name: flatten(part.state_dict(), pile.put, f"{_OURS}also/{name}")
            for name, part in (also or {}).items()
        },
        "random": flatten(_random_states(), pile.put, f"{_OURS}random") if random_state else None,
        "extra": flatten(dict(extra or {}), pile.put, f"{_OURS}extra"),
    }
    if _is_rank_zero():
        header = _header(meta, pile)
        try:
            replace_file(path, lambda partial: save_file(pile.tensors, partial, header))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                "the checkpoint cannot be written",
                where=str(path),
                found=str(error),
                wanted=f"{sum(t.nbytes for t in pile.tensors.values()):,} bytes of space in a "
                "folder that can be written",
                mend="make room and save again; the file that was there before is untouched",
            ) from error
    return path


class _Pile:
    """The tensors of one file: on the CPU, contiguous, each with memory of its own."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.complex128: list[str] = []
        self._storages: set[tuple[str, int]] = set()

    def put(self, key: str, x: Tensor) -> None:
        if x.layout is not torch.strided or x.is_quantized or x.device.type == "meta":
            raise CheckpointError(
                "this tensor has no plain values to save",
                where=key,
                found=f"layout {x.layout}, device {x.device}",
                wanted="a dense tensor with values",
            )
        x = gather(x.detach()).cpu().resolve_conj().resolve_neg().contiguous()
        if x.dtype is torch.complex128:  # safetensors has no such type
            self.complex128.append(key)
            x = torch.view_as_real(x)
        shared = x.untyped_storage().nbytes() != x.nbytes or storage_key(x) in self._storages
        if shared and x.nbytes:
            x = x.clone()
        self._storages.add(storage_key(x))
        self.tensors[key] = x


def _header(meta: dict[str, Any], pile: _Pile) -> dict[str, str]:
    meta["complex128"] = pile.complex128
    meta["crc32"] = {key: _crc32(x) for key, x in pile.tensors.items()}
    text = json.dumps(meta, allow_nan=False)
    return {"learnables": text, "learnables_crc32": str(zlib.crc32(text.encode()))}


def _crc32(x: Tensor) -> int:
    return zlib.crc32(x.reshape(-1).view(torch.uint8).numpy().data) if x.nbytes else 0


def _is_rank_zero() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or (
        distributed.get_rank() == 0
    )


def _write_model(model: nn.Module, pile: _Pile) -> dict[str, Any]:
    state = model.state_dict()
    names = _plain_names(state)
    ties: dict[str, str] = {}
    others: dict[str, Any] = {}
    first: dict[Any, str] = {}
    for key, value in state.items():
        name = names[key]
        if name.startswith(_OURS):
            raise CheckpointError(
                "a name of the model is reserved for the checkpoint itself",
                where=name,
                wanted=f"a name that does not begin with {_OURS!r}",
            )
        if not isinstance(value, Tensor):
            others[name] = flatten(value, pile.put, f"{_OURS}model/{name}")
            continue
        same = (storage_key(value), value.storage_offset(), value.shape, value.stride())
        if value.numel() and same in first and value.dtype == state[first[same]].dtype:
            ties[name] = names[first[same]]
        else:
            first[same] = key
            pile.put(name, value)
    metadata = getattr(state, "_metadata", {})
    metadata = {without_wrappers(f"{key}.x").rpartition(".")[0]: m for key, m in metadata.items()}
    return {
        "ties": ties,
        "other": others,
        "metadata": flatten(metadata, pile.put, f"{_OURS}model"),
    }


def _plain_names(keys: Iterable[str]) -> dict[str, str]:
    """Key → name without wrappers; the keys themselves where that would merge two of them."""
    names = {key: without_wrappers(key) for key in keys}
    return names if len(set(names.values())) == len(names) else {key: key for key in names}


def _one_name(entry: Entry) -> str:
    """A name that does not depend on which name of a tied parameter was registered first."""
    return min(entry.plain_names)


def _write_initial(model: nn.Module, pile: _Pile) -> list[str]:
    names = []
    for entry in entries(model):
        if entry.initial is not None and entry.initial.device.type != "meta":
            names.append(_one_name(entry))
            pile.put(f"{_OURS}initial/{names[-1]}", entry.initial)
    return names


def _write_optimizer(
    optimizer: Optimizer, model: nn.Module, pile: _Pile, path: str
) -> dict[str, Any]:
    name_of = _names_in(optimizer, model)
    groups = [
        {
            "names": [name_of[p] for p in group["params"]],
            "options": flatten(_options(group), pile.put, f"{path}/group{i}"),
        }
        for i, group in enumerate(optimizer.param_groups)
    ]
    state = {
        name_of[p]: flatten(dict(values), pile.put, f"{path}/{name_of[p]}")
        for p, values in optimizer.state.items()
        if p in name_of
    }
    return {"class": type(optimizer).__qualname__, "groups": groups, "state": state}


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    without = ("params", "param_names", *_IMPLEMENTATION)
    return {key: value for key, value in group.items() if key not in without}


def _names_in(optimizer: Optimizer, model: nn.Module) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {entry.param: _one_name(entry) for entry in entries(model)}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = [p for p in held if p not in names]
    if strangers:
        raise CheckpointError(
            "the optimizer holds parameters that the model does not have, so they have no name",
            found=", ".join(f"shape {tuple(p.shape)}" for p in strangers[:_SHOWN]),
            wanted="one module that holds all that the optimizer holds",
            mend="ln.save_checkpoint(path, nn.ModuleDict({'model': model, 'criterion': criterion}),"
            " optimizer)",
        )
    return {p: names[p] for p in held}


def _random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - what other code uses
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


# --- read --------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file whole and verify every checksum, without a model.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it is not ours.
    """
    return _read(Path(path))


def _read(path: Path) -> Checkpoint:
    if not path.is_file():
        raise CheckpointError(
            "there is no checkpoint", where=str(path), wanted="a file of ln.save_checkpoint"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # clone: the tensors of safetensors lie in a memory map of the file
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    text = header.get("learnables")
    if text is None:
        raise CheckpointError(
            "this safetensors file is no checkpoint of learnables",
            where=str(path),
            found=f"{len(tensors)} tensors, no header of ours",
            wanted="a file of ln.save_checkpoint",
            mend="model.load_state_dict(safetensors.torch.load_file(path))",
        )
    if header.get("learnables_crc32") != str(zlib.crc32(text.encode())):
        raise _damaged(path, "the checksum of the header is wrong")
    meta = json.loads(text)
    if meta["format"] > FORMAT:
        raise CheckpointError(
            "the checkpoint was written by a newer version of learnables",
            where=str(path),
            found=f"format {meta['format']}",
            wanted=f"format ≤ {FORMAT}",
            mend="pip install -U learnables",
        )
    _verify(path, meta["crc32"], tensors)
    for key in meta["complex128"]:
        tensors[key] = torch.view_as_complex(tensors[key])
    return _assemble(path, meta, tensors)


def _verify(path: Path, crc32: dict[str, int], tensors: dict[str, Tensor]) -> None:
    if crc32.keys() != tensors.keys():
        raise _damaged(path, "the header lists other tensors than the file holds")
    for key, x in tensors.items():
        if _crc32(x) != crc32[key]:
            raise _damaged(path, f"the checksum of {key} is wrong")


def _assemble(path: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
    state = {key: x for key, x in tensors.items() if not key.startswith(_OURS)}
    for name, source in meta["model"]["ties"].items():
        state[name] = state[source]
    for name, value in meta["model"]["other"].items():
        state[name] = unflatten(value, tensors)
    meta["model"]["metadata"] = unflatten(meta["model"]["metadata"], tensors)
    meta["initial"] = {name: tensors[f"{_OURS}initial/{name}"] for name in meta["initial"]}
    for part in meta["optimizers"]:
        part["state"] = unflatten(part["state"], tensors)
        part["groups"] = unflatten(part["groups"], tensors)
    meta["also"] = unflatten(meta["also"], tensors)
    meta["random"] = unflatten(meta["random"], tensors)
    return Checkpoint(path, meta["step"], unflatten(meta["extra"], tensors), state, meta)


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "the checkpoint is damaged",
        where=str(path),
        found=found,
        wanted="the bytes that ln.save_checkpoint wrote",
        mend="take an older checkpoint, or train anew",
    )


# --- load --------------------------------------------------------------------------------------


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] = (),
    *,
    also: Mapping[str, Stateful] | None = None,
    random_state: bool = True,
    strict: bool = True,
) -> Checkpoint:
    """Restore what `save_checkpoint` saved, matching everything by name.

    The file is read and verified before anything changes. Values go into the parameters that
    exist: their device, dtype, strides, ties and wrappers stay. Tables with a ``resize`` rule may
    have another shape. Values that parameters decay toward are restored, also for `ln.attach`.

    Args:
        path: The file.
        model: The model, bare or wrapped, on its device.
        optimizer: As many optimizers as were saved, in the same order, or none to leave them out.
        also: Name → object whose ``load_state_dict`` gets what was saved under that name.
        random_state: Whether to set the random states of torch, numpy and Python too.
        strict: False lets names of the model be missing or unexpected, and keeps the options of
            optimizer groups that hold other parameters than any saved group.

    Returns:
        The checkpoint: ``.step``, ``.extra``.

    Raises:
        CheckpointError: The file is missing or damaged, or is one of another model: all missing,
            unexpected and mis-shaped names are listed, and the model is as it was.

    Cost:
        The file once in host memory, and a second copy of the model while it is loaded.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    checkpoint = read_checkpoint(path)
    meta, also = checkpoint.meta, also or {}
    absent = [name for name in also if name not in meta["also"]]
    if absent or (optimizers and len(optimizers) != len(meta["optimizers"])):
        raise CheckpointError(
            "the checkpoint lacks what is to be loaded",
            where=str(path),
            found=f"{len(meta['optimizers'])} optimizers; also: "
            f"{', '.join(meta['also']) or 'nothing'}",
            wanted=f"{len(optimizers)} optimizers; also: {', '.join(also) or 'nothing'}",
        )
    prepared = [
        _optimizer_state(opt, model, saved, path, strict)
        for opt, saved in zip(optimizers, meta["optimizers"], strict=False)
    ]
    _load_model(checkpoint, model, strict)
    for opt, state in zip(optimizers, prepared, strict=True):
        _load_optimizer(opt, state)
    _load_initial(model, meta["initial"], optimizers)
    for name, part in also.items():
        _load_other(checkpoint, name, part)
    if random_state and meta["random"] is not None:
        _set_random_states(meta["random"])
    return checkpoint


class _State(dict[str, Any]):
    """A state dict with the metadata that modules wrote into it."""

    _metadata: dict[str, Any]


def _load_model(checkpoint: Checkpoint, model: nn.Module, strict: bool) -> None:
    own = model.state_dict()
    names = _plain_names(own)
    state = _State({key: checkpoint.model[n] for key, n in names.items() if n in checkpoint.model})
    unexpected = sorted(set(checkpoint.model) - set(names.values()))
    missing = [name for key, name in names.items() if key not in state]
    metadata = checkpoint.meta["model"]["metadata"]
    state._metadata = {
        key: metadata.get(without_wrappers(f"{key}.x").rpartition(".")[0], {})
        for key in getattr(own, "_metadata", {})
    }
    _compare_ties(checkpoint, own, names)
    before = {key: x.detach().clone() for key, x in own.items() if isinstance(x, Tensor)}
    shapes = {key: x.shape for key, x in state.items() if isinstance(x, Tensor)}
    for key, x in state.items():
        if is_dtensor(own[key]):
            state[key] = distribute_like(x, own[key])
    complaint = ""
    try:
        model.load_state_dict(state, strict=False)
    except (RuntimeError, LearnablesError) as error:  # a shape, or a rule for shapes
        complaint = str(error)
    if not complaint and not (strict and (missing or unexpected)):
        return
    with torch.no_grad():  # as it was
        for key, x in model.state_dict().items():
            if key in before:
                x.copy_(before[key])
    resized = _with_resize(model) if complaint.startswith("Error(s) in loading") else set()
    misshapen = [
        f"{names[key]} {tuple(shape)} instead of {tuple(own[key].shape)}"
        for key, shape in shapes.items()
        if complaint and key not in resized and shape != own[key].shape
    ]
    raise CheckpointError(
        "this is the checkpoint of another model",
        where=str(checkpoint.path),
        found="; ".join(
            f"{what}: {_list(which)}"
            for what, which in [
                ("missing", missing),
                ("unexpected", unexpected),
                ("mis-shaped", misshapen or [complaint] * bool(complaint)),
            ]
            if which
        ),
        wanted=f"the {len(names)} names and shapes of the model",
        mend="build the model as it was saved, or load the names that fit with strict=False",
    )


def _compare_ties(checkpoint: Checkpoint, own: Mapping[str, Any], names: dict[str, str]) -> None:
    first: dict[Any, str] = {}
    for key, value in own.items():
        if not isinstance(value, Tensor) or not value.numel():
            continue
        name, same = names[key], (storage_key(value), value.storage_offset(), value.shape)
        source = first.setdefault(same, name)
        a, b = checkpoint.model.get(name), checkpoint.model.get(source)
        if isinstance(a, Tensor) and isinstance(b, Tensor) and not torch.equal(a, b):
            raise CheckpointError(
                "the checkpoint has two different values for one tied parameter",
                where=f"{source}, {name}",
                found="one Parameter in the model, two different values in the file",
                wanted="equal values, or no tie",
                mend=f"ln.untie(model, {name!r})",
            )
    tied = {names[key] for key in own} & set(checkpoint.model) & set(checkpoint.ties)
    loose = [n for n in tied if n in first.values() and checkpoint.ties[n] in first.values()]
    if loose:
        warn(
            "parameters that were tied when the checkpoint was saved are not tied in the model",
            where=_list(sorted(loose)),
            found="they start equal and will drift apart",
            wanted="one Parameter under each of these names",
            mend=f"ln.tie(model, {sorted(loose)[0]!r}, {checkpoint.ties[sorted(loose)[0]]!r})",
        )


def _with_resize(model: nn.Module) -> set[str]:
    return {
        place.name
        for entry in entries(model)
        for place in entry.places
        if place.note.get("resize") is not None
    }


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _optimizer_state(
    optimizer: Optimizer, model: nn.Module, saved: dict[str, Any], path: str | Path, strict: bool
) -> dict[str, Any]:
    # In the order and grouping of this optimizer, as its load_state_dict wants it.
    name_of = _names_in(optimizer, model)
    options_of = {frozenset(group["names"]): group["options"] for group in saved["groups"]}
    state: dict[int, Any] = {}
    groups = []
    for group in optimizer.param_groups:
        names = [name_of[p] for p in group["params"]]
        options = options_of.get(frozenset(names))
        if options is None and strict:
            raise CheckpointError(
                "the optimizer groups its parameters otherwise than the checkpoint",
                where=str(path),
                found=f"no saved group of exactly: {_list(names)}",
                wanted="groups of the same parameters, in any order",
                mend="build the optimizer as it was saved, or keep the options of the new groups "
                "with strict=False",
            )
        ids = range(len(state), len(state) + len(names))
        state.update({i: saved["state"].get(name) for i, name in zip(ids, names, strict=True)})
        kept = {key: value for key, value in group.items() if key != "params"}
        kept.update(options or {})
        groups.append({**kept, "params": list(ids)})
    return {"state": {i: s for i, s in state.items() if s is not None}, "param_groups": groups}


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == params[i].shape and value.ndim:
                # torch keeps the strides of the file and casts to the parameter's dtype: the fused
                # CPU optimizers read both tensors in memory order, and a master copy has more bits.
                optimizer.state[params[i]][key] = _laid_out_like(params[i], value)


def _laid_out_like(param: Tensor, value: Tensor) -> Tensor:
    if is_dtensor(param):
        return distribute_like(value, param)
    return torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)


def _load_other(checkpoint: Checkpoint, name: str, part: Stateful) -> None:
    try:
        part.load_state_dict(checkpoint.meta["also"][name])
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{type(part).__name__}.load_state_dict refuses what was saved under this name",
            where=f"{checkpoint.path}: {name}",
            found=f"{type(error).__name__}: {error}",
            wanted="the state of an object of the same kind and settings",
        ) from error


def _load_initial(
    model: nn.Module, initial: Mapping[str, Tensor], optimizers: Sequence[Optimizer]
) -> None:
    for entry in entries(model):
        value = initial.get(_one_name(entry))
        if value is None or entry.initial is None or value.shape != entry.shape:
            continue
        for place in entry.places:
            note = note_of(place.owner, place.local_name)
            if note.initial is not None:
                fitting = value.to(note.initial.device if not _on_meta(note.initial) else "cpu")
                put_note(place.owner, place.local_name, replace(note, initial=fitting))
    for optimizer in optimizers:
        if attachment_of(optimizer) is not None:
            attach(model, optimizers)  # it holds the old values
            break


def _on_meta(x: Tensor) -> bool:
    return x.device.type == "meta"


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        with suppress(RuntimeError):  # fewer devices than when it was saved
            torch.cuda.set_rng_state_all(states["cuda"])
