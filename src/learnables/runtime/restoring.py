"""What a checkpoint holds, put into a model and its optimizers: everything by name."""

import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import (
    distribute_like,
    dtype_name,
    gather,
    is_dtensor,
    storage_key,
    tensors_in,
    without_wrappers,
)
from learnables.arguments import as_annotated, optimizers_in, require_names
from learnables.entries import entries
from learnables.errors import CheckpointError, LearnablesError, warn
from learnables.notes import note_of, put_note
from learnables.policy.attach import attach, attachment_of
from learnables.runtime.checkpoint import (
    Checkpoint,
    Matched,
    Stateful,
    filled,
    in_words,
    listed,
    names_in,
    one_name,
    open_checkpoint,
    options_of,
    policy_in_words,
)
from learnables.runtime.renaming import Rename, Renaming, plain_names
from learnables.runtime.untrusted import refuse

_ONE = torch.Size([1])  # the shape that sharding gives to a scalar


@as_annotated
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
    optimizers = optimizers_in(optimizer)
    names = plain_names(model.state_dict())
    checkpoint, renamed = _renamed(checkpoint, Renaming(checkpoint.model, names.values(), rename))
    checkpoint = filled(checkpoint, _likes(checkpoint, model, optimizers))
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
    load_initial(model, meta["initial"], optimizers)
    for name, part in also.items():
        _load_other(checkpoint, name, part)
    if random_states is not None:
        _set_random_states(random_states)
    changed = compare_policies(meta["policy"], model)
    matched = replace(matched, renamed=renamed, anew=anew, changed=changed)
    return replace(checkpoint, matched=matched)


def _likes(
    checkpoint: Checkpoint, model: nn.Module, optimizers: Sequence[Optimizer]
) -> dict[str, Tensor | None]:
    """Key of each sharded tensor that is wanted here → the tensor that says how it is cut."""
    shards, own = checkpoint.shards, model.state_dict()
    if shards is None:
        return {}
    walk = {one_name(entry): entry for entry in entries(model)}
    likes: dict[str, Tensor | None] = {}

    def want(found: object, like: Tensor | None) -> None:
        for x in tensors_in((found,)):
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


class _Allowed:
    """The names that may be missing or unexpected.

    Raises:
        CheckpointError: A pattern fits nothing, so it is a mistake.
    """

    def __init__(self, allow: str | Sequence[str], names: set[str]) -> None:
        if not isinstance(allow, str):
            require_names(allow, "allow")
        self.patterns = [allow] if isinstance(allow, str) else list(allow)
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise CheckpointError(
                    "a pattern of allow fits no name of the model or of the checkpoint",
                    where=pattern,
                    found=f"{len(names)} names: {listed(sorted(names))}",
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
            f"{what}: {listed(which)}"
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
    return dtype_name(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _same_kind(a: object, b: object) -> bool:
    """Whether the one is a number where the other is: of any width, but not of another sort."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return isinstance(a, Tensor) == isinstance(b, Tensor)
    return (a.is_floating_point(), a.is_complex()) == (b.is_floating_point(), b.is_complex())


def compare_policies(saved: Mapping[str, Mapping[str, str]], model: nn.Module) -> tuple[str, ...]:
    """What was declared otherwise then than it is now, in sentences."""
    now = policy_in_words(model)
    known = {one_name(entry) for entry in entries(model)}
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
            where=listed(sorted(loose)),
            found="they start equal and will drift apart",
            wanted="one Parameter under each of these names",
            mend=f"ln.tie(model, {sorted(loose)[0]!r}, {checkpoint.ties[sorted(loose)[0]]!r})",
        )


def _differ(a: Tensor, b: Tensor) -> bool:
    return not torch.equal(gather(a), gather(b))


def _resize_rules(model: nn.Module) -> dict[str, str]:
    """Name → the rule by which its shape may change, in words."""
    return {
        name: in_words(place.note.get("resize"))
        for entry in entries(model)
        for place, name in zip(entry.places, entry.plain_names, strict=True)
        if place.note.get("resize") is not None
    }


def _optimizer_state(
    optimizer: Optimizer,
    model: nn.Module,
    saved: dict[str, Any],
    checkpoint: Checkpoint,
    allowed: _Allowed,
    anew: dict[str, str],
) -> dict[str, Any]:
    # In the order and grouping of this optimizer, as its load_state_dict wants it.
    name_of = names_in(optimizer, model)
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
        for key, value in options_of(options).items():
            if key in kept and not _alike(value, kept[key]):
                raise CheckpointError(
                    "an option of the optimizer is of another kind in the checkpoint",
                    where=f"{checkpoint.path}: group of {listed(names)}",
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
        found=f"no saved group of exactly: {listed(names)}",
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


def load_initial(
    model: nn.Module, initial: Mapping[str, Tensor], optimizers: Sequence[Optimizer]
) -> None:
    """Restore the values that parameters decay toward, also where `ln.attach` holds them."""
    for entry in entries(model):
        value = initial.get(one_name(entry))
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
