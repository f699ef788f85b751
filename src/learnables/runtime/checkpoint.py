"""Save everything that training needs to go on, in one file, atomically; load it by name.

The file is plain safetensors: the model's tensors under their own names, so that any tool reads
them, and everything else under names that begin with ``learnables/``. What is no tensor is JSON in
the header. Nothing is pickled, and every part has a checksum.
"""

import json
import random
import re
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import (
    gather,
    is_dtensor,
    is_uninitialised,
    storage_key,
    without_wrappers,
)
from learnables.arguments import as_annotated, optimizers_in
from learnables.entries import Entry, entries
from learnables.errors import CheckpointError
from learnables.runtime.atomic import replace_file
from learnables.runtime.plain import flatten, unflatten
from learnables.runtime.renaming import plain_names
from learnables.runtime.sharded import Shards, agree, discard, sweep, write_shards
from learnables.runtime.untrusted import FORMAT, read_meta, refuse, sealed

_OURS = "learnables/"
_SHOWN = 40  # how many names an error message lists
_TRIES = 10  # of a file that a training replaces while it is read: header and tensors must be one's
# How a step is computed, not what it computes: the optimizer that loads keeps its own choice.
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
# What was declared about a parameter and tells at a resume that the code has changed.
_COMPARED = (
    "weight_decay",
    "lr_scale",
    "storage_dtype",
    "compute_dtype",
    "rounding",
    "memory_format",
    "constraint",
)


class Stateful(Protocol):
    """Anything with ``state_dict`` and ``load_state_dict``: a scheduler, a scaler, an EMA model."""

    def state_dict(self) -> Any:
        """The state as plain data and tensors."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take over such a state."""


@dataclass(frozen=True)
class Matched:
    """What of a file went where, as `load_checkpoint` found it; prints as one line for each thing.

    Attributes:
        loaded: How many names of the model got their value.
        of: How many names the model has.
        renamed: Name in the file → name in the model, where they differ.
        missing: Names of the model that the file lacks, allowed by ``allow``.
        unexpected: Names of the file that the model lacks, allowed by ``allow``.
        resized: Name → shapes before and after, and who changed it.
        anew: Name → why its optimizer state was not taken over and begins anew.
        changed: Sentences: what was declared otherwise when the file was written.
    """

    loaded: int = 0
    of: int = 0
    renamed: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resized: Mapping[str, str] = field(default_factory=dict)
    anew: Mapping[str, str] = field(default_factory=dict)
    changed: tuple[str, ...] = ()

    def __str__(self) -> str:
        """All of it, one line a thing."""
        lines = [f"{self.loaded} of {self.of} names loaded"]
        lines += [f"renamed: {old} → {new}" for old, new in self.renamed.items()]
        lines += [f"missing, as it was: {name}" for name in self.missing]
        lines += [f"unexpected, left out: {name}" for name in self.unexpected]
        lines += [f"resized: {name} {how}" for name, how in self.resized.items()]
        lines += [f"optimizer state begins anew: {name}, {why}" for name, why in self.anew.items()]
        lines += [f"declared otherwise: {sentence}" for sentence in self.changed]
        return "\n".join(lines)


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, read whole and verified.

    Attributes:
        path: The file.
        step: The step it was saved at, or None.
        extra: What the caller added.
        model: The model's state dict; a tied tensor stands under each of its names. Of a sharded
            checkpoint that was loaded into a sharded model, the parts of this rank; what the model
            lacks is on the meta device.
        meta: Everything else, as plain data with tensors in it.
        matched: What went where, once it was loaded; ``print(checkpoint.matched)``.
        shards: The files of a sharded checkpoint, or None.
    """

    path: Path
    step: int | None
    extra: dict[str, Any]
    model: dict[str, Any]
    meta: dict[str, Any]
    matched: Matched = field(default_factory=Matched)
    shards: Shards | None = None

    @property
    def ties(self) -> dict[str, str]:
        """Name → the name of the tensor that it shared when it was saved."""
        ties: dict[str, str] = self.meta["model"]["ties"]
        return ties


# --- save --------------------------------------------------------------------------------------


@as_annotated
def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] = (),
    *,
    also: Mapping[str, Stateful] | None = None,
    step: int | None = None,
    extra: Mapping[str, Any] | None = None,
    random_state: bool = True,
    sharded: bool = False,
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
        sharded: Whether each rank writes its own part of what is sharded, in parallel and without
            gathering it, into a folder beside ``path``; ``load_checkpoint(path)`` finds it there,
            with any number of ranks. For models that do not fit into the memory of one host.

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
        With ``sharded`` all must call, and a rank needs memory for one copy of its own part.
    """
    path = Path(path)
    optimizers = optimizers_in(optimizer)
    pile = _Pile(keeps_shards=sharded)
    meta: dict[str, Any] = {
        "format": FORMAT,
        "torch": torch.__version__,
        "step": step,
        "model": _write_model(model, pile),
        "initial": _write_initial(model, pile),
        "policy": policy_in_words(model),
        "optimizers": [
            _write_optimizer(opt, model, pile, f"{_OURS}optimizer/{i}")
            for i, opt in enumerate(optimizers)
        ],
        "also": {
            name: flatten(part.state_dict(), pile.put_whole, f"{_OURS}also/{name}")
            for name, part in (also or {}).items()
        },
        "random": flatten(_random_states(), pile.put_whole, f"{_OURS}random")
        if random_state
        else None,
        "extra": flatten(dict(extra or {}), pile.put_whole, f"{_OURS}extra"),
    }
    if sharded:
        _write_sharded(path, meta, pile)
    elif is_rank_zero():
        try:
            _write_file(path, meta, pile)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                "the checkpoint cannot be written",
                where=str(path),
                found=str(error),
                wanted=f"{sum(t.nbytes for t in pile.tensors.values()):,} bytes of space in a "
                "folder that can be written",
                mend="make room and save again; the file that was there before is untouched",
            ) from error
        sweep(path, keep=None)  # of a sharded one that it has replaced
    return path


def _write_file(path: Path, meta: dict[str, Any], pile: "_Pile") -> None:
    header = _header(meta, pile)
    replace_file(path, lambda partial: save_file(pile.tensors, partial, header))


def _write_sharded(path: Path, meta: dict[str, Any], pile: "_Pile") -> None:
    """The parts first; the file that says which parts are meant, last: until then the old ones are.

    Raises:
        CheckpointError: A rank could not write; on all ranks alike.
    """
    meta["shards"], said = write_shards(path, pile.shards), ""
    if is_rank_zero():
        try:
            _write_file(path, meta, pile)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:  # else others wait
            discard(path, meta["shards"])
            said = str(error)
        else:
            sweep(path, keep=meta["shards"]["folder"])
    agree(path, said)


class _Pile:
    """The tensors of one file: on the CPU, contiguous, each with memory of its own."""

    def __init__(self, *, keeps_shards: bool = False) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.shards: dict[str, Tensor] = {}
        self._keeps_shards = keeps_shards
        self.complex128: list[str] = []
        self._storages: set[tuple[str, int]] = set()

    def put(self, key: str, x: Tensor) -> None:
        """Take a tensor; a DTensor as it is where parts are kept, else put together.

        Raises:
            CheckpointError: It cannot be written.
        """
        if not (self._keeps_shards and is_dtensor(x)):
            self.put_whole(key, x)
            return
        if x.dtype is torch.complex128:
            raise CheckpointError(
                "a sharded tensor of this dtype cannot be written",
                where=key,
                found="torch.complex128, which safetensors lacks",
                wanted="torch.complex64, or a checkpoint in one file",
                mend="ln.save_checkpoint(path, model, optimizer)",
            )
        self.shards[key] = x

    def put_whole(self, key: str, x: Tensor) -> None:
        """Take a tensor, a DTensor put together by a collective call.

        Raises:
            CheckpointError: It has no plain values.
        """
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
    return sealed("learnables", text)


def _crc32(x: Tensor) -> int:
    """Of the bytes, and of what they mean: the same bytes are other numbers in another dtype."""
    return crc32(x, zlib.crc32(f"{x.dtype} {tuple(x.shape)}".encode()))


def crc32(x: Tensor, before: int = 0) -> int:
    """The checksum of the bytes of ``x``, after those of ``before``."""
    raw = x.cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(raw.numpy().data, before) if raw.numel() else before


def is_rank_zero() -> bool:
    """Whether this process is the one that writes; the only one is."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or (
        distributed.get_rank() == 0
    )


def _write_model(model: nn.Module, pile: _Pile) -> dict[str, Any]:
    state = model.state_dict()
    names = plain_names(state)
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
        if isinstance(value, Tensor) and is_uninitialised(value):
            raise CheckpointError(
                "a lazy parameter has no value to save",
                where=name,
                wanted="a model that has seen one batch",
                mend="model(batch), once, before",
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


def one_name(entry: Entry) -> str:
    """A name that does not depend on which name of a tied parameter was registered first."""
    return min(entry.plain_names)


def _write_initial(model: nn.Module, pile: _Pile) -> list[str]:
    names = []
    for entry in entries(model):
        if entry.initial is not None and entry.initial.device.type != "meta":
            names.append(one_name(entry))
            pile.put(f"{_OURS}initial/{names[-1]}", entry.initial)
    return names


def policy_in_words(model: nn.Module) -> dict[str, dict[str, str]]:
    """What was declared about each parameter, in words: to be compared, never to be evaluated."""
    found: dict[str, dict[str, str]] = {}
    for entry in entries(model):
        said = {} if entry.trainable else {"trainable": "False"}
        for key in _COMPARED:
            values = [v for place in entry.places if (v := place.note.get(key)) is not None]
            if values:
                said[key] = in_words(values[0])
        if said:
            found[one_name(entry)] = said
    return found


def in_words(value: object) -> str:
    """Without what differs from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _write_optimizer(
    optimizer: Optimizer, model: nn.Module, pile: _Pile, path: str
) -> dict[str, Any]:
    name_of = names_in(optimizer, model)
    groups = [
        {
            "names": [name_of[p] for p in group["params"]],
            "options": flatten(options_of(group), pile.put, f"{path}/group{i}"),
        }
        for i, group in enumerate(optimizer.param_groups)
    ]
    state = {
        name_of[p]: flatten(dict(values), pile.put, f"{path}/{name_of[p]}")
        for p, values in optimizer.state.items()
        if p in name_of
    }
    return {"class": type(optimizer).__qualname__, "groups": groups, "state": state}


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group says beside its parameters and how its step is computed."""
    without = ("params", "param_names", *_IMPLEMENTATION)
    return {key: value for key, value in group.items() if key not in without}


def names_in(optimizer: Optimizer, model: nn.Module) -> dict[Tensor, str]:
    """The names of what an optimizer holds.

    Raises:
        CheckpointError: It holds a parameter that the model does not have.
    """
    names: dict[Tensor, str] = {entry.param: one_name(entry) for entry in entries(model)}
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


def listed(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


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
    """Read a file whole and verify every checksum, without a model; the parts of a sharded one too.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it is not ours.
    """
    checkpoint = open_checkpoint(path, together=False)
    shards = checkpoint.shards
    return checkpoint if shards is None else filled(checkpoint, dict.fromkeys(shards.places))


def open_checkpoint(path: str | Path, *, together: bool = True) -> Checkpoint:
    """As `read_checkpoint`, but the parts of a sharded one are looked at only, and not yet read.

    Args:
        path: The file.
        together: Whether all ranks call; they share the work of looking at the parts, and where one
            finds a part damaged, all raise.

    Raises:
        CheckpointError: As there.
    """
    checkpoint = _open(Path(path))
    if checkpoint.shards is not None:
        checkpoint.shards.verify(together=together)
    return checkpoint


def _open(path: Path) -> Checkpoint:
    for _ in range(_TRIES):
        before = _identity(path)
        try:
            return _read(path)
        except CheckpointError:
            if _identity(path) == before:
                raise
    return _read(path)


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What is another one once the file was replaced."""
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns, status.st_size
    return None


def _read(path: Path) -> Checkpoint:
    meta = read_meta(path)
    try:
        with safe_open(path, framework="pt") as file:
            # clone: the tensors of safetensors lie in a memory map of the file
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        _verify(path, meta["crc32"], tensors)
        for key in meta["complex128"]:
            tensors[key] = torch.view_as_complex(tensors[key])
        shards = Shards(path, meta["shards"]) if "shards" in meta else None
        if shards is not None:
            if tensors.keys() & shards.places.keys():
                refuse(path, "a tensor lies both in it and in its parts")
            tensors.update(shards.places)
        return replace(_assemble(path, meta, tensors), shards=shards)
    except CheckpointError as error:
        if error.where:
            raise
        refuse(path, error.found)  # what is in the file tells `unflatten` no name
    except (OSError, SafetensorError) as error:
        refuse(path, str(error))
    except (RuntimeError, LookupError, TypeError, ValueError, RecursionError) as error:
        refuse(path, f"its header fits no checkpoint: {type(error).__name__}: {error}")


def _verify(path: Path, crc32: dict[str, int], tensors: dict[str, Tensor]) -> None:
    if crc32.keys() != tensors.keys():
        refuse(path, "the header lists other tensors than the file holds")
    for key, x in tensors.items():
        if _crc32(x) != crc32[key]:
            refuse(path, f"the checksum of {key} is wrong")


def _assemble(path: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
    state = {key: x for key, x in tensors.items() if not key.startswith(_OURS)}
    for name, source in meta["model"]["ties"].items():
        state[name] = state[source]
    for name, value in meta["model"]["other"].items():
        state[name] = unflatten(value, tensors)
    meta["model"]["metadata"] = unflatten(meta["model"]["metadata"], tensors)
    meta["initial"] = {name: tensors[f"{_OURS}initial/{name}"] for name in meta["initial"]}
    for part in meta["optimizers"]:
        part["state"] = {n: _mapping(unflatten(v, tensors)) for n, v in part["state"].items()}
        for group in part["groups"]:
            group["options"] = _mapping(unflatten(group["options"], tensors))
    meta["also"] = unflatten(meta["also"], tensors)
    meta["random"] = unflatten(meta["random"], tensors)
    extra = _mapping(unflatten(meta["extra"], tensors))
    return Checkpoint(path, meta["step"], extra, state, meta)


def _mapping(value: Any) -> dict[Any, Any]:
    """``value``, which has to be a dict.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} where a dict belongs")
    return value


def filled(checkpoint: Checkpoint, likes: Mapping[str, Tensor | None]) -> Checkpoint:
    """With the values of these sharded tensors where their places were."""
    shards = checkpoint.shards
    if shards is None or not likes:
        return checkpoint
    made = shards.fill(likes, together=any(like is not None for like in likes.values()))

    def put(value: Any) -> Any:
        if isinstance(value, Tensor):
            return made.get(shards.key_of(value) or "", value)
        if isinstance(value, dict):
            return {key: put(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(put, value))
        return value

    meta = {**checkpoint.meta, "initial": put(checkpoint.meta["initial"])}
    meta["optimizers"] = [
        {**part, "state": put(part["state"])} for part in checkpoint.meta["optimizers"]
    ]
    return replace(checkpoint, model=put(checkpoint.model), meta=meta)
