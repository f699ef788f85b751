"""Save everything that training needs to go on, in one file, atomically; load it by name.

The file is plain safetensors: the model's tensors under their own names, so that any tool reads
them, and everything else under names that begin with ``learnables/``. What is no tensor is JSON in
the header. Nothing is pickled, and every part has a checksum.
"""

import json
import random
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
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
from learnables.runtime.renaming import Rename, Renaming, plain_names
from learnables.runtime.sharded import Shards, agree, discard, sweep, write_shards
from learnables.runtime.untrusted import FORMAT, read_meta, refuse

_OURS = "learnables/"
_SHOWN = 40  # how many names an error message lists
_TRIES = 10  # of a file that a training replaces while it is read: header and tensors must be one's
_ONE = torch.Size([1])  # the shape that sharding gives to a scalar
# How a step is computed, not what it computes: the optimizer that loads keeps its own choice.
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
# What was declared about a parameter and tells at a resume that the code has changed.
_COMPARED = ("weight_decay", "lr_scale", "compute_dtype", "memory_format", "constraint")


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
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    pile = _Pile(keeps_shards=sharded)
    meta: dict[str, Any] = {
        "format": FORMAT,
        "torch": torch.__version__,
        "step": step,
        "model": _write_model(model, pile),
        "initial": _write_initial(model, pile),
        "policy": _policy(model),
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
    return {"learnables": text, "learnables_crc32": str(zlib.crc32(text.encode()))}


def _crc32(x: Tensor) -> int:
    """Of the bytes, and of what they mean: the same bytes are other numbers in another dtype."""
    seed = zlib.crc32(f"{x.dtype} {tuple(x.shape)}".encode())
    return zlib.crc32(x.reshape(-1).view(torch.uint8).numpy().data, seed) if x.nbytes else seed


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


def _policy(model: nn.Module) -> dict[str, dict[str, str]]:
    """What was declared about each parameter, in words: to be compared, never to be evaluated."""
    found: dict[str, dict[str, str]] = {}
    for entry in entries(model):
        said = {} if entry.trainable else {"trainable": "False"}
        for key in _COMPARED:
            values = [v for place in entry.places if (v := place.note.get(key)) is not None]
            if values:
                said[key] = _words(values[0])
        if said:
            found[_one_name(entry)] = said
    return found


def _words(value: object) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


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
    """Read a file whole and verify every checksum, without a model; the parts of a sharded one too.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it is not ours.
    """
    checkpoint = open_checkpoint(path, together=False)
    shards = checkpoint.shards
    return checkpoint if shards is None else _filled(checkpoint, dict.fromkeys(shards.places))


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


# --- load --------------------------------------------------------------------------------------


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] = (),
    *,
    also: Mapping[str, Stateful] | None = None,
    random_state: bool = True,
    rename: Rename = None,
    allow: str | Sequence[str] = (),
) -> Checkpoint:
    """Restore what `save_checkpoint` saved, matching everything by name.

    The file is read and verified before anything changes. Values go into the parameters that
    exist: their device, dtype, strides, ties and wrappers stay. Tables with a ``resize`` rule may
    have another shape; their optimizer state then begins anew. Values that parameters decay toward
    are restored, also for `ln.attach`. Names are compared without ``module.`` and ``_orig_mod.``;
    where no name fits and all would with ``model.`` before it, or without, that is understood too.

    Args:
        path: The file.
        model: The model, bare or wrapped, on its device.
        optimizer: As many optimizers as were saved, in the same order, or none to leave them out.
        also: Name → object whose ``load_state_dict`` gets what was saved under that name.
        random_state: Whether to set the random states of torch, numpy and Python too.
        rename: Name in the file → name in the model: whole names, prefixes
            (``{"encoder.*": "trunk.*"}``), or a function. Optimizer state follows its parameter.
        allow: Globs of the names that may be missing or unexpected; all others must be on both
            sides. ``"head.*"`` loads all but the head, ``"*"`` whatever fits.

    Returns:
        The checkpoint: ``.step``, ``.extra``; ``print(checkpoint.matched)`` says what went where.

    Raises:
        CheckpointError: The file is missing or damaged, or is one of another model: all missing,
            unexpected and mis-shaped names are listed, and the model is as it was.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "body.safetensors"
        >>> _ = ln.save_checkpoint(path, nn.ModuleDict({"body": nn.Linear(2, 2)}))
        >>> model = nn.ModuleDict({"trunk": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        >>> print(ln.load_checkpoint(
        ...     path, model, rename={"body.*": "trunk.*"}, allow="head.*").matched)
        2 of 4 names loaded
        renamed: body.bias → trunk.bias
        renamed: body.weight → trunk.weight
        missing, as it was: head.weight
        missing, as it was: head.bias

    Cost:
        The file once in host memory, and a second copy of the model while it is loaded.
    """
    checkpoint = open_checkpoint(path)
    return restore(
        checkpoint,
        model,
        optimizer,
        also=also,
        random_state=random_state,
        rename=rename,
        allow=allow,
    )


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] = (),
    *,
    also: Mapping[str, Stateful] | None = None,
    random_state: bool = True,
    rename: Rename = None,
    allow: str | Sequence[str] = (),
) -> Checkpoint:
    """As `load_checkpoint`, from a file that `open_checkpoint` or `read_checkpoint` has read.

    Raises:
        CheckpointError: It is one of another model.
    """
    path = checkpoint.path
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    names = plain_names(model.state_dict())
    checkpoint, renamed = _renamed(checkpoint, Renaming(checkpoint.model, names.values(), rename))
    checkpoint = _filled(checkpoint, _likes(checkpoint, model, optimizers))
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
    allowed = _Allowed(allow, {*names.values(), *checkpoint.model})
    anew: dict[str, str] = {}
    prepared = [
        _optimizer_state(opt, model, saved, checkpoint, allowed, anew)
        for opt, saved in zip(optimizers, meta["optimizers"], strict=False)
    ]
    random_states = meta["random"] if random_state else None
    if random_states is not None:
        _check_random_states(path, random_states)
    matched = _load_model(checkpoint, model, allowed)
    for opt, state in zip(optimizers, prepared, strict=True):
        _load_optimizer(opt, state)
    _load_initial(model, meta["initial"], optimizers)
    for name, part in also.items():
        _load_other(checkpoint, name, part)
    if random_states is not None:
        _set_random_states(random_states)
    changed = _compare_policies(meta["policy"], model)
    matched = replace(matched, renamed=renamed, anew=anew, changed=changed)
    return replace(checkpoint, matched=matched)


def _likes(
    checkpoint: Checkpoint, model: nn.Module, optimizers: Sequence[Optimizer]
) -> dict[str, Tensor | None]:
    """Key of each sharded tensor that is wanted here → the tensor that says how it is cut."""
    shards, own = checkpoint.shards, model.state_dict()
    if shards is None:
        return {}
    walk = {_one_name(entry): entry for entry in entries(model)}
    likes: dict[str, Tensor | None] = {}

    def want(found: object, like: Tensor | None) -> None:
        for x in _tensors_in(found):
            if (key := shards.key_of(x)) is not None:
                likes.setdefault(key, like)

    for key, name in plain_names(own).items():
        want(checkpoint.model.get(name), own[key])
    for part in checkpoint.meta["optimizers"] if optimizers else ():
        for name, state in part["state"].items():
            if name in walk:
                want(state, walk[name].param)
    for name, value in checkpoint.meta["initial"].items():
        if name in walk:
            want(value, walk[name].initial)
    return likes


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return (
        [x for p in parts for x in _tensors_in(p)] if isinstance(value, (dict, list, tuple)) else []
    )


def _filled(checkpoint: Checkpoint, likes: Mapping[str, Tensor | None]) -> Checkpoint:
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


class _Allowed:
    """The names that may be missing or unexpected.

    Raises:
        CheckpointError: A pattern fits nothing, so it is a mistake.
    """

    def __init__(self, allow: str | Sequence[str], names: set[str]) -> None:
        self.patterns = [allow] if isinstance(allow, str) else list(allow)
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise CheckpointError(
                    "a pattern of allow fits no name of the model or of the checkpoint",
                    where=pattern,
                    found=f"{len(names)} names: {_list(sorted(names))}",
                    wanted="a name, or a glob such as 'head.*'",
                )

    def __call__(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def split(self, names: Iterable[str]) -> tuple[tuple[str, ...], list[str]]:
        """Those that are allowed, and the others."""
        names = list(names)
        return tuple(filter(self, names)), [name for name in names if not self(name)]


def _renamed(checkpoint: Checkpoint, to: Renaming) -> tuple[Checkpoint, dict[str, str]]:
    if not to.changed:
        return checkpoint, {}

    def keys(of: Mapping[str, Any]) -> dict[str, Any]:
        return {to(name): value for name, value in of.items()}

    meta = dict(checkpoint.meta)
    saved = meta["model"]
    meta["model"] = {
        **saved,
        "ties": {to(name): to(source) for name, source in saved["ties"].items()},
        "metadata": {
            to(f"{key}.x").rpartition(".")[0]: value for key, value in saved["metadata"].items()
        },
    }
    meta["initial"], meta["policy"] = keys(meta["initial"]), keys(meta["policy"])
    meta["optimizers"] = [
        {
            **part,
            "state": keys(part["state"]),
            "groups": [{**g, "names": [to(n) for n in g["names"]]} for g in part["groups"]],
        }
        for part in meta["optimizers"]
    ]
    return replace(checkpoint, model=keys(checkpoint.model), meta=meta), to.changed


class _State(dict[str, Any]):
    """A state dict with the metadata that modules wrote into it."""

    _metadata: dict[str, Any]


def _load_model(checkpoint: Checkpoint, model: nn.Module, allowed: _Allowed) -> Matched:
    own = model.state_dict()
    names = plain_names(own)
    state = _State({key: checkpoint.model[n] for key, n in names.items() if n in checkpoint.model})
    unexpected, too_many = allowed.split(sorted(set(checkpoint.model) - set(names.values())))
    missing, too_few = allowed.split(name for key, name in names.items() if key not in state)
    metadata = checkpoint.meta["model"]["metadata"]
    state._metadata = {
        key: metadata.get(without_wrappers(f"{key}.x").rpartition(".")[0], {})
        for key in getattr(own, "_metadata", {})
    }
    _compare_ties(checkpoint, own, names)
    before = {key: x.detach().clone() for key, x in own.items() if isinstance(x, Tensor)}
    shapes = {key: x.shape for key, x in state.items() if isinstance(x, Tensor)}
    mistyped = [f"{names[k]} {_typed(x)} instead of {_typed(own[k])}" for k, x in state.items()]
    mistyped = [
        said
        for said, (k, x) in zip(mistyped, state.items(), strict=True)
        if not _same_kind(x, own[k])
    ]
    for key, x in state.items():
        if is_dtensor(own[key]):
            state[key] = distribute_like(_as_scalar_of(own[key], x), own[key])
    complaint = ""
    try:
        if not mistyped:
            model.load_state_dict(state, strict=False)
    except (RuntimeError, LearnablesError) as error:  # a shape, or a rule for shapes
        complaint = str(error)
    if not (complaint or mistyped or too_few or too_many):
        rules = _resize_rules(model)
        return Matched(
            loaded=len(state),
            of=len(names),
            missing=missing,
            unexpected=unexpected,
            resized={
                names[key]: f"from {tuple(shape)} to {tuple(own[key].shape)}"
                + (f" by its rule, {rules[names[key]]}" if names[key] in rules else "")
                for key, shape in shapes.items()
                if shape != own[key].shape
            },
        )
    with torch.no_grad():  # as it was
        for key, x in model.state_dict().items():
            if key in before:
                x.copy_(before[key])
    resized = _resize_rules(model) if complaint.startswith("Error(s) in loading") else {}
    misshapen = [
        f"{names[key]} {tuple(shape)} instead of {tuple(own[key].shape)}"
        for key, shape in shapes.items()
        if complaint and names[key] not in resized and shape != own[key].shape
    ]
    raise CheckpointError(
        "this is the checkpoint of another model",
        where=str(checkpoint.path),
        found="; ".join(
            f"{what}: {_list(which)}"
            for what, which in [
                ("missing", too_few),
                ("unexpected", too_many),
                ("mis-typed", mistyped),
                ("mis-shaped", misshapen or [complaint] * bool(complaint)),
            ]
            if which
        ),
        wanted=f"the {len(names)} names and shapes of the model",
        mend=_mend(too_few, too_many, checkpoint.path),
    )


def _mend(missing: Sequence[str], unexpected: Sequence[str], path: Path) -> str:
    heads = sorted({name.split(".")[0] for name in (*missing, *unexpected)})
    if not heads:
        return "build the model as it was saved"
    allow = [f"{head}*" for head in heads] if len(heads) <= 3 else ["*"]
    return f"ln.load_checkpoint({str(path)!r}, model, allow={allow!r})"


def _typed(x: object) -> str:
    return str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__


def _same_kind(a: object, b: object) -> bool:
    """Whether the one is a number where the other is: of any width, but not of another sort."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return isinstance(a, Tensor) == isinstance(b, Tensor)
    return (a.is_floating_point(), a.is_complex()) == (b.is_floating_point(), b.is_complex())


def _compare_policies(saved: Mapping[str, Mapping[str, str]], model: nn.Module) -> tuple[str, ...]:
    now = _policy(model)
    known = {_one_name(entry) for entry in entries(model)}
    sentences = []
    for name in sorted(known & {*saved, *now}):
        then, today = saved.get(name, {}), now.get(name, {})
        for key in sorted({*then, *today}):
            if then.get(key) != today.get(key):
                was, is_ = then.get(key, "not declared"), today.get(key, "not declared")
                sentences.append(f"{name}: {key} was {was}, is {is_}")
        if "constraint" in then and "constraint" not in today:
            warn(
                "a parameter that was constrained when the checkpoint was saved is free now",
                where=name,
                found="no constraint is declared for it in the model",
                wanted=then["constraint"],
                mend="declare it as before, in ln.parameter or with ln.constrain",
            )
    return tuple(sentences)


def _compare_ties(checkpoint: Checkpoint, own: Mapping[str, Any], names: dict[str, str]) -> None:
    first: dict[Any, str] = {}
    for key, value in own.items():
        if not isinstance(value, Tensor) or not value.numel():
            continue
        name, same = names[key], (storage_key(value), value.storage_offset(), value.shape)
        source = first.setdefault(same, name)
        a, b = checkpoint.model.get(name), checkpoint.model.get(source)
        if a is not b and isinstance(a, Tensor) and isinstance(b, Tensor) and _differ(a, b):
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


def _differ(a: Tensor, b: Tensor) -> bool:
    return not torch.equal(gather(a), gather(b))


def _resize_rules(model: nn.Module) -> dict[str, str]:
    """Name → the rule by which its shape may change, in words."""
    return {
        name: _words(place.note.get("resize"))
        for entry in entries(model)
        for place, name in zip(entry.places, entry.plain_names, strict=True)
        if place.note.get("resize") is not None
    }


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _optimizer_state(
    optimizer: Optimizer,
    model: nn.Module,
    saved: dict[str, Any],
    checkpoint: Checkpoint,
    allowed: _Allowed,
    anew: dict[str, str],
) -> dict[str, Any]:
    # In the order and grouping of this optimizer, as its load_state_dict wants it.
    name_of = _names_in(optimizer, model)
    kept_names = {name for group in saved["groups"] for name in group["names"]}
    state: dict[int, Any] = {}
    groups = []
    for group in optimizer.param_groups:
        names = [name_of[p] for p in group["params"]]
        options = _options_for(names, saved["groups"], allowed, checkpoint.path)
        ids = range(len(state), len(state) + len(names))
        for i, name, p in zip(ids, names, group["params"], strict=True):
            state[i] = _fitting(saved["state"].get(name), checkpoint.model.get(name), p)
            if name not in kept_names:
                anew[name] = "which the file has no state for"
            elif state[i] is None and saved["state"].get(name):
                anew[name] = f"whose shape was {tuple(checkpoint.model[name].shape)}"
        kept = {key: value for key, value in group.items() if key != "params"}
        for key, value in _options(options).items():
            if key in kept and not _alike(value, kept[key]):
                raise CheckpointError(
                    "an option of the optimizer is of another kind in the checkpoint",
                    where=f"{checkpoint.path}: group of {_list(names)}",
                    found=f"{key} = {value!r}",
                    wanted=f"something like {kept[key]!r}",
                )
            kept[key] = value
        groups.append({**kept, "params": list(ids)})
    return {"state": {i: s for i, s in state.items() if s is not None}, "param_groups": groups}


def _options_for(
    names: Sequence[str], groups: Sequence[dict[str, Any]], allowed: _Allowed, path: Path
) -> dict[str, Any]:
    """The saved options of the group that holds ``names``, but for those allowed to differ.

    Raises:
        CheckpointError: There is no such group.
    """
    for same in (set, lambda of: {name for name in of if not allowed(name)}):
        fitting = [group for group in groups if same(group["names"]) == same(names)]
        if same(names) and len(fitting) == 1:
            options: dict[str, Any] = fitting[0]["options"]
            return options
    if all(map(allowed, names)):
        return {}
    raise CheckpointError(
        "the optimizer groups its parameters otherwise than the checkpoint",
        where=str(path),
        found=f"no saved group of exactly: {_list(names)}",
        wanted="groups of the same parameters, in any order",
        mend="build the optimizer as it was saved, or name the parameters that may differ in "
        "allow=, which keeps the options of their groups",
    )


def _fitting(
    state: dict[str, Any] | None, saved: Tensor | None, param: Tensor
) -> dict[str, Any] | None:
    """Optimizer state for the shape that the parameter has now; None where it has to begin anew."""
    if state is None or saved is None or saved.shape == param.shape:
        return state
    if saved.numel() != 1 or param.numel() != 1:
        return None
    return {  # () and (1,) are one number
        key: _as_scalar_of(param, x) if key != "step" else x for key, x in state.items()
    }


def _alike(a: object, b: object) -> bool:
    """Whether two options are of one kind: numbers, texts, or lists of the same length."""
    if a is None or b is None:
        return True
    for kind in ((bool, int, float, Tensor), (str,), (list, tuple)):
        if isinstance(a, kind) and isinstance(b, kind):
            return kind != (list, tuple) or len(a) == len(b)  # type: ignore[arg-type]
    return type(a) is type(b)


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == params[i].shape and value.ndim:
                # torch keeps the strides of the file and casts to the parameter's dtype: the fused
                # CPU optimizers read both tensors in memory order, and a master copy has more bits.
                optimizer.state[params[i]][key] = _laid_out_like(params[i], value)


def _as_scalar_of(param: Tensor, value: Any) -> Any:
    """A value of shape () as (1,), or the reverse, where ``param`` has the other shape."""
    if isinstance(value, Tensor) and {value.shape, param.shape} == {torch.Size([]), _ONE}:
        return value.reshape(param.shape)
    return value


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
        if (attachment := attachment_of(optimizer)) is not None:
            attach(model, optimizers, **attachment.options)  # it holds the old values
            break


def _on_meta(x: Tensor) -> bool:
    return x.device.type == "meta"


def _check_random_states(path: Path, states: Any) -> None:
    """Set them somewhere else first, so that a file that lies about them changes nothing."""
    try:
        torch.Generator().set_state(states["torch"])
        kind, keys, *rest = states["numpy"]
        np.random.RandomState().set_state((kind, keys.numpy().astype(np.uint32), *rest))
        random.Random().setstate(states["python"])
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        refuse(path, f"its random states are none: {type(error).__name__}: {error}")


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        with suppress(RuntimeError):  # fewer devices than when it was saved
            torch.cuda.set_rng_state_all(states["cuda"])
