"""Save what was added to a model, without the model; put it into another copy of the same one.

The file is safetensors: the tensors of grafts and of whatever else trains under their own names,
and JSON in the header that says what went where and into which model. Nothing is pickled, and no
class is looked up by a name from the file: only those of `learnables.nn` and what the caller hands
over.
"""

import difflib
import json
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import learnables.nn as components_of_ours
from learnables._torch import gather
from learnables.arguments import require_kind, require_module, require_path, require_text
from learnables.errors import CheckpointError, warn
from learnables.grafting.freezing import has_statistics, is_held
from learnables.grafting.graft import Graft, graft, grafts_of
from learnables.nn.component import Component, built_with
from learnables.notes import note_of
from learnables.runtime.atomic import replace_file
from learnables.runtime.checkpoint import crc32
from learnables.runtime.reading import DELTA, verify_delta
from learnables.runtime.untrusted import header_text, sealed

FORMAT = 1
_PARTS = {
    "names": "names and shapes of its parameters",
    "values": "values of its parameters",
    "statistics": "running statistics",
}


def save_delta(model: nn.Module, path: str | Path) -> tuple[str, ...]:
    """Write the grafts of ``model`` and every other parameter that trains; the rest stays out.

    Running statistics go with it, except those of layers that `ln.freeze` keeps in evaluation mode:
    the others have moved with every batch.

    Args:
        model: The bare model, with grafts.
        path: The file, replaced as a whole or not at all.

    Returns:
        Names of the tensors in the file.

    Raises:
        ArgumentError: ``model`` is no module or ``path`` no path.
        CheckpointError: The model has no graft, or ``path`` is a folder.

    Example:
        >>> import tempfile
        >>> def build():
        ...     torch.manual_seed(0)
        ...     return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> model = build()
        >>> handle = ln.graft(model, "scale", ln.nn.LayerScale(4, 0.5), at="0")
        >>> _ = ln.train_only(model, "scale.*")
        >>> file = tempfile.mkdtemp() + "/delta.safetensors"
        >>> ln.save_delta(model, file)
        ('scale.gamma',)
        >>> other = build()
        >>> [handle.name for handle in ln.load_delta(other, file)]
        ['scale']

    Cost:
        One checksum over the base parameters; the file holds the rest, a few kB for prompts.
    """
    require_module(model)
    require_path(path, "path", wanted="the file to write", mend='path="delta.safetensors"')
    path = Path(path)
    grafts = _required_grafts(model)
    if path.is_dir():
        raise CheckpointError(
            "a delta is one file, and this is a folder",
            where=str(path),
            wanted="the file to write",
            mend=f"ln.save_delta(model, {str(path / 'delta.safetensors')!r})",
        )
    fronts = tuple(f"{g.name}." for g in grafts)
    moves = {name for name, param in model.named_parameters() if param.requires_grad}
    moves |= set(_statistics(model, held=False))
    kept = {
        name: gather(value.detach()).cpu().contiguous().clone()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and (name.startswith(fronts) or name in moves)
    }
    meta = {
        "format": FORMAT,
        "learnables": version("learnables"),
        "grafts": [_describe(g) for g in grafts],
        "base": _fingerprint(model, {*kept}),
        "crc32": {name: crc32(x) for name, x in kept.items()},
    }
    text = json.dumps(meta, allow_nan=False)
    header = sealed(DELTA, text)
    replace_file(path, lambda partial: save_file(kept, partial, metadata=header))
    return tuple(sorted(kept))


def load_delta(
    model: nn.Module,
    path: str | Path,
    *,
    components: Mapping[str, nn.Module] | None = None,
) -> tuple[Graft, ...]:
    """Put what `save_delta` wrote into ``model``, a fresh copy of the model it was saved from.

    Everything is read and compared before anything is changed. A tensor of another size that its
    component can resize is resized, and a `LearnablesWarning` says which.

    Args:
        model: The base model, with its base weights and without these grafts.
        path: The file.
        components: Name of a graft → module to put in, for components that are not of
            `learnables.nn`; built by the caller as it was.

    Returns:
        The handles of the grafts, in the order in which they were put in.

    Raises:
        ArgumentError: An argument is of another kind than it takes.
        CheckpointError: The file is missing, damaged or newer, belongs to another base model, or
            holds what the model has not or has in another shape; or ``components`` has one that the
            file does not name.
    """
    require_module(model)
    require_path(path, "path", wanted="a file of ln.save_delta", mend='path="delta.safetensors"')
    given = _components(components)
    path = Path(path)
    meta, tensors = _read(path)
    base, grafts = _parts(path, meta)
    _refuse_strangers(path, given, [name for name, *_ in grafts])
    added = tuple(f"{name}." for name, *_ in grafts)
    for name in tensors:
        if not name.startswith(added):
            _check_place(path, name, model.state_dict())
    found = _fingerprint(model, {*tensors})
    for part, what in _PARTS.items():
        if base.get(part) != found[part]:
            raise CheckpointError(
                f"the delta belongs to another base model: {what} differ",
                where=str(path),
                found=f"{what} with checksum {found[part]}",
                wanted=f"checksum {base.get(part)}",
                mend="load the base weights that the delta was trained on first",
            )
    made = {name: _build(path, name, spec, given) for name, _, _, spec in grafts}
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    for name, component in made.items():
        if name not in given:
            _become(component.to(device), f"{name}.", tensors)
    own = dict(model.state_dict())
    own.update({f"{n}.{key}": x for n, c in made.items() for key, x in c.state_dict().items()})
    for name, x in tensors.items():
        _check_fit(path, name, x, own, made, model)
    before = {name: own[name].detach().clone() for name in tensors if not name.startswith(added)}
    handles: list[Graft] = []
    try:
        for name, at, where, _ in grafts:
            handles.append(
                graft(model, name, made[name], at[0] if len(at) == 1 else at, where=where)
            )
        model.load_state_dict(tensors, strict=False)  # the load hook of its owner resizes a tensor
    except BaseException:
        for handle in reversed(handles):
            handle.remove()
        model.load_state_dict(before, strict=False)
        raise
    resized = [
        f"{name} {tuple(x.shape)} → {tuple(own[name].shape)}"
        for name, x in tensors.items()
        if x.shape != own[name].shape
    ]
    if resized:
        warn(
            "tensors of the delta were resized to their places in the model",
            where=str(path),
            found="; ".join(resized),
        )
    return tuple(handles)


def _required_grafts(model: nn.Module) -> list[Graft]:
    """The grafts of ``model``.

    Raises:
        CheckpointError: There is none; where a module inside has some, it is named.
    """
    grafts = grafts_of(model)
    if grafts:
        return grafts
    inside = next((name for name, m in model.named_modules() if grafts_of(m)), None)
    if inside is not None:
        raise CheckpointError(
            "the grafts are not this model's but those of a module in it",
            where=inside,
            found="0 grafts of the model",
            wanted="the model that was given to ln.graft",
            mend=f"ln.save_delta(model.get_submodule({inside!r}), path)",
        )
    raise CheckpointError(
        "there is no graft in this model to save",
        found="0 grafts",
        wanted="at least one",
        mend="ln.graft(model, name, component), or ln.save_checkpoint(path, model)",
    )


def _components(given: object) -> Mapping[str, nn.Module]:
    """What was handed over: name → module.

    Raises:
        ArgumentError: It is something else.
    """
    given = {} if given is None else given
    require_kind(
        given,
        "components",
        Mapping,
        wanted="a dict, name of the graft → module",
        mend='components={"extra": component}',
    )
    checked: Mapping[str, nn.Module] = given  # type: ignore[assignment]
    for name, component in checked.items():
        require_text(name, "components")
        require_module(component, name)
    return checked


def _refuse_strangers(path: Path, given: Mapping[str, nn.Module], names: list[str]) -> None:
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1, 0.0)
            raise CheckpointError(
                "a component was handed over for a graft that the delta does not hold",
                where=str(path),
                found=f"components={{{name!r}: …}}",
                wanted=f"one of {', '.join(map(repr, names))}",
                mend=f"components={{{close[0]!r}: …}}" if close else "",
            )


def _parts(path: Path, meta: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    try:
        grafts = [(g["name"], tuple(g["at"]), g["where"], g["component"]) for g in meta["grafts"]]
        texts = [text for name, at, where, _ in grafts for text in (name, where, *at)]
        right = all(isinstance(text, str) for text in texts) and isinstance(meta["base"], dict)
        if right and all(at and isinstance(spec, dict) for _, at, _, spec in grafts):
            return meta["base"], grafts
    except (KeyError, TypeError) as error:
        raise _damaged(path, f"its header has no right {error}") from error
    raise _damaged(path, "its header says nothing right about grafts")


def _describe(made: Graft) -> dict[str, Any]:
    kind = type(made.component)
    ours = getattr(components_of_ours, kind.__name__, None) is kind
    return {
        "name": made.name,
        "at": list(made.at),
        "where": made.where,
        "component": {
            "class": kind.__qualname__ if ours else f"{kind.__module__}.{kind.__qualname__}",
            "arguments": built_with(made.component) if ours else None,
        },
    }


def _build(
    path: Path, name: str, spec: Mapping[str, Any], given: Mapping[str, nn.Module]
) -> nn.Module:
    if name in given:
        return given[name]
    kind = getattr(components_of_ours, str(spec.get("class")), None)
    arguments = spec.get("arguments")
    ours = isinstance(kind, type) and issubclass(kind, Component)
    if ours and isinstance(arguments, dict):
        try:
            built: nn.Module = kind(*arguments["args"], **arguments["kwargs"])  # type: ignore[misc]
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"{name} cannot be built: {error}") from error
        return built
    raise CheckpointError(
        "a component of the delta cannot be built from the file alone",
        where=name,
        found=f"{spec.get('class')}",
        wanted="a component of learnables.nn with plain arguments, or one handed over",
        mend=f"ln.load_delta(model, path, components={{{name!r}: component}})",
    )


def _become(component: nn.Module, front: str, tensors: Mapping[str, Tensor]) -> None:
    """Give a component that was just built the dtypes that it was saved in."""
    for name, param in component.named_parameters():
        saved = tensors.get(front + name)
        if saved is not None and saved.is_floating_point():
            param.data = param.data.to(saved.dtype)


def _check_fit(
    path: Path,
    name: str,
    x: Tensor,
    own: Mapping[str, Any],
    made: Mapping[str, nn.Module],
    model: nn.Module,
) -> None:
    _check_place(path, name, own)
    target = own[name]
    if target.shape == x.shape:
        return
    owner_name, _, local = name.rpartition(".")
    front, _, inner = owner_name.partition(".")
    owner = made[front].get_submodule(inner) if front in made else model.get_submodule(owner_name)
    if note_of(owner, local).get("resize") is None:
        raise CheckpointError(
            "a tensor of the delta has another shape than its place in the model",
            where=name,
            found=f"shape {tuple(x.shape)}",
            wanted=f"shape {tuple(target.shape)}",
            mend="build the component as it was saved",
        )


def _check_place(path: Path, name: str, own: Mapping[str, Any]) -> None:
    if not isinstance(own.get(name), Tensor):
        close = difflib.get_close_matches(name, own, 3, 0.4)
        raise CheckpointError(
            "the delta holds a tensor that the model has no place for",
            where=name,
            found=str(path),
            wanted=f"a name of the model, such as {', '.join(close)}" if close else "a name of it",
            mend="load it into the model it was saved from",
        )


def _fingerprint(model: nn.Module, without: set[str]) -> dict[str, int]:
    """Checksums of `_PARTS` of what is not in ``without``."""
    names, values, statistics = 0, 0, 0
    for name, param in sorted(model.named_parameters()):
        if name not in without:
            names = zlib.crc32(f"{name} {tuple(param.shape)} {param.dtype}".encode(), names)
            values = crc32(gather(param.detach()), values)
    for name, buffer in sorted(_statistics(model).items()):
        if name not in without:
            statistics = crc32(gather(buffer.detach()), zlib.crc32(name.encode(), statistics))
    return {"names": names, "values": values, "statistics": statistics}


def _statistics(model: nn.Module, *, held: bool = True) -> dict[str, Tensor]:
    """The buffers of layers that average over batches; without those that are frozen or not."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        if has_statistics(module) and (held or not is_held(module))
        for name, buffer in module.named_buffers(recurse=False)
    }


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(
            "there is no delta", where=str(path), wanted="a file of ln.save_delta"
        )
    try:
        header_text(path)  # refuses headers that claim more than there is
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            meta = json.loads(told.get(DELTA, "null"))
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    number = meta.get("format") if isinstance(meta, dict) else None
    if type(number) is not int:
        raise _damaged(path, "its header describes no delta")
    if number > FORMAT:
        raise CheckpointError(
            "the delta was written by a newer version of learnables",
            where=str(path),
            found=f"format {number}, of learnables {meta.get('learnables', '?')}",
            wanted=f"format ≤ {FORMAT}, of learnables {version('learnables')}",
            mend="pip install -U learnables",
        )
    verify_delta(path, told, tensors)
    return meta, tensors


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "the delta is damaged, or no delta",
        where=str(path),
        found=found,
        wanted="the bytes that ln.save_delta wrote",
        mend="take another copy of the file",
    )
