"""Look into a checkpoint: what it holds, and whether it is the checkpoint of this model.

What ``learnables inspect`` prints. Values are compared as they are, by object where names are tied;
nothing is loaded into anything.
"""

import difflib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from learnables._torch import is_uninitialised, without_wrappers
from learnables.auditing.factory import UsersError, build
from learnables.auditing.writers import check_format, put
from learnables.entries import entries
from learnables.runtime.reading import StateFile, read_state
from learnables.runtime.renaming import Renaming, plain_names
from learnables.stats import statistics
from learnables.watching.sinks.escape import visible

FORMATS = ("text", "json")
_SHOWN = 12  # lines of a list in the text; the JSON has all
_LEGACY = {"gamma": "weight", "beta": "bias"}
_TOO_FAR = (0, 0.6)  # no component in common at the end, and letters that are not much alike


@final
@dataclass
class Inspection:
    """What was seen in a file; ``print(inspection)`` is the page that people read.

    Attributes:
        path: The file.
        kind: Who wrote it.
        about: What it says of itself.
        tensors: Name → shape and dtype in words, as they stand in the file.
        values: How many numbers it holds.
        nonfinite: Name → how many of its values are NaN or infinite.
        ties: Name → the name that has the same memory in the file.
        model: What it was compared with, or empty.
        prefix: What all names of the file had in front, and the model's have not.
        missing: Names of the model that the file lacks.
        unexpected: Names of the file that the model lacks.
        added: Names that a delta brings with it.
        misshaped: Name → both shapes, where no resize rule makes one of the other.
        resized: Name → both shapes, where a resize rule does.
        untied: Names that are one Parameter in the model and have different values in the file.
        initial: Trainable parameters whose value is bit for bit that of a model just built.
        rename: Map to type: names of the file → names of the model, guessed by shape and name.
        base: The other file, or empty.
        changed: Name → ‖x − base‖ ÷ ‖base‖.
        only_here: Names that the base lacks, or has in another shape.
        only_there: Names that the file lacks.
    """

    path: str
    kind: str
    about: dict[str, str]
    tensors: dict[str, str]
    values: int
    nonfinite: dict[str, int] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    model: str = ""
    prefix: str = ""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    misshaped: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    initial: list[str] = field(default_factory=list)
    rename: dict[str, str] = field(default_factory=dict)
    base: str = ""
    changed: dict[str, float] = field(default_factory=dict)
    only_here: list[str] = field(default_factory=list)
    only_there: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was found that somebody should look at."""
        problems = (self.nonfinite, self.missing, self.unexpected, self.misshaped)
        return not any((*problems, self.untied, self.initial))

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2, ensure_ascii=True)

    def __str__(self) -> str:
        """As text, at most 12 names of each kind."""
        return "\n".join(_page(self))


def inspect_file(
    path: str | Path,
    model: nn.Module | None = None,
    base: str | Path | None = None,
    *,
    called: str = "the model",
) -> Inspection:
    """Compare a file with a model that was just built, and with another file.

    Args:
        path: A file of `ln.save_checkpoint`, `ln.save_delta`, safetensors or ``torch.save``.
        model: Just built, so that its values are the initial ones; it is not changed.
        base: A file to measure the difference from, such as the pretrained one.
        called: What the text calls the model.

    Raises:
        CheckpointError: A file is missing, damaged, hostile, or holds no named tensors.

    Cost:
        Each file once in host memory, one look at its values.
    """
    file = read_state(path)
    seen = Inspection(
        path=str(path),
        kind=file.kind,
        about=file.about,
        tensors={name: _looks(x) for name, x in file.state.items()},
        values=sum(x.numel() for x in file.state.values()),
        nonfinite=_nonfinite(file.state),
        ties=file.ties,
    )
    if model is not None:
        seen.model = called
        _compare_with_model(seen, file, model)
    if base is not None:
        seen.base = str(base)
        _compare_with_base(seen, file.state, read_state(base).state)
    return seen


def _looks(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def _nonfinite(state: Mapping[str, Tensor]) -> dict[str, int]:
    names = [n for n, x in state.items() if x.is_floating_point() or x.is_complex()]
    if not names:
        return {}
    counts = statistics([state[name] for name in names], histogram=False).nonfinite.tolist()
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


# --- with a model --------------------------------------------------------------------------------


def _compare_with_model(seen: Inspection, file: StateFile, model: nn.Module) -> None:
    state = {k: x for k, x in model.state_dict().items() if isinstance(x, Tensor)}
    own = {name: state[key] for key, name in plain_names(state).items()}
    plain = plain_names(file.state)
    held = {plain[name]: x for name, x in file.state.items()}
    renaming = Renaming(list(held), list(own))
    held = {renaming(name): x for name, x in held.items()}
    seen.prefix = _prefix(file.state, held)
    is_delta = file.kind == "ln.save_delta"  # holds what it adds and what trained, not the rest
    fronts = tuple(f"{name}." for name in file.added)
    seen.missing = [name for name in own if name not in held and not is_delta]
    seen.unexpected = [n for n in held if n not in own and not (fronts and n.startswith(fronts))]
    seen.added = [name for name in held if name not in own and name not in seen.unexpected]
    resizable = _resizable(model)
    for name, x in held.items():
        if name in own and x.shape != own[name].shape:
            shapes = f"{tuple(x.shape)} in the file, {tuple(own[name].shape)} in the model"
            scalars = {tuple(x.shape), tuple(own[name].shape)} == {(), (1,)}
            where = seen.resized if name in resizable or scalars else seen.misshaped
            where[name] = shapes
    seen.untied = _untied(model, held)
    seen.initial = _still_initial(model, held)
    seen.rename = suggest_renames(
        {name: held[name].shape for name in seen.unexpected},
        {name: own[name].shape for name in seen.missing},
    )


def _prefix(before: Iterable[str], after: Iterable[str]) -> str:
    """What stood in front of every name of the file that the comparison took away."""
    cut = {
        old.removesuffix(new)
        for old, new in zip(before, after, strict=True)
        if old != new and old.endswith(new)
    }
    return cut.pop() if len(cut) == 1 else ""


def _resizable(model: nn.Module) -> set[str]:
    return {
        without_wrappers(place.name)
        for entry in entries(model)
        for place in entry.places
        if place.note.get("resize") is not None
    }


def _untied(model: nn.Module, held: Mapping[str, Tensor]) -> list[str]:
    found = []
    for entry in entries(model):
        values = [held[name] for name in entry.plain_names if name in held]
        if any(not _same(x, values[0]) for x in values[1:]):
            found.append(" = ".join(entry.plain_names))
    return found


def _still_initial(model: nn.Module, held: Mapping[str, Tensor]) -> list[str]:
    found = []
    for entry in entries(model):
        if not entry.trainable or entry.param.is_meta or is_uninitialised(entry.param):
            continue
        name = next((name for name in entry.plain_names if name in held), None)
        if name is not None and _same(held[name], entry.param.detach()):
            found.append(name)
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b.cpu()))


# --- renames -------------------------------------------------------------------------------------


def suggest_renames(
    unexpected: Mapping[str, Sequence[int]], missing: Mapping[str, Sequence[int]]
) -> dict[str, str]:
    """Guess which name of the file is which of the model: same shape, and names that end alike.

    Args:
        unexpected: Name in the file → shape.
        missing: Name in the model → shape.

    Returns:
        A map for ``ln.load_checkpoint(…, rename=)``: prefixes where they explain all names below
        them, whole names for the rest. A name that could be several is left out.

    Example:
        >>> suggest_renames({"enc.0.weight": (4, 4), "enc.0.bias": (4,), "ln.gamma": (4,)},
        ...                 {"trunk.0.weight": (4, 4), "trunk.0.bias": (4,), "ln.weight": (4,)})
        {'enc.*': 'trunk.*', 'ln.gamma': 'ln.weight'}
    """
    pairs: dict[str, str] = {}
    free = dict(missing)
    for old, shape in unexpected.items():
        ranked = sorted(
            ((_likeness(old, new), new) for new in free if tuple(free[new]) == tuple(shape)),
            reverse=True,
        )
        several = len(ranked) > 1 and ranked[0][0] == ranked[1][0]
        if ranked and ranked[0][0] > _TOO_FAR and not several:
            pairs[old] = ranked[0][1]
            del free[ranked[0][1]]
    return dict(_by_prefix(pairs, unexpected))


def _likeness(old: str, new: str) -> tuple[int, float]:
    """How many components they share at the end, then how alike the letters are."""
    a, b = _modern(old), _modern(new)
    shared = 0
    while shared < min(len(a), len(b)) and a[-1 - shared] == b[-1 - shared]:
        shared += 1
    return shared, difflib.SequenceMatcher(None, ".".join(a), ".".join(b)).ratio()


def _modern(name: str) -> list[str]:
    parts = name.split(".")
    return [*parts[:-1], _LEGACY.get(parts[-1], parts[-1])]


def _by_prefix(
    pairs: Mapping[str, str], unexpected: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, str]]:
    """Pairs that only differ in front become one pair of prefixes, where that is all of them."""
    groups: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for old, new in pairs.items():
        a, b = old.split("."), new.split(".")
        while len(a) > 1 and len(b) > 1 and a[-1] == b[-1]:
            a.pop()
            b.pop()
        groups[".".join(a), ".".join(b)].append(old)
    for (before, after), olds in groups.items():
        below = [name for name in unexpected if name.startswith(f"{before}.")]
        if len(olds) > 1 and sorted(below) == sorted(olds):
            yield f"{before}.*", f"{after}.*"
        else:
            yield from ((old, pairs[old]) for old in olds)


# --- with a base ---------------------------------------------------------------------------------


def _compare_with_base(
    seen: Inspection, state: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> None:
    state = {name: state[key] for key, name in plain_names(state).items()}
    base = {name: base[key] for key, name in plain_names(base).items()}
    renaming = Renaming(list(base), list(state))
    base = {renaming(name): x for name, x in base.items()}
    for name, x in state.items():
        if name not in base or base[name].shape != x.shape:
            seen.only_here.append(name)
            continue
        wide = torch.complex128 if x.is_complex() else torch.float64
        there = base[name].to(wide)
        size = float(torch.linalg.vector_norm(there))
        moved = float(torch.linalg.vector_norm(x.to(wide) - there))
        seen.changed[name] = moved / size if size else float(moved > 0)
    seen.only_there = [name for name in base if name not in state]


# --- the page ------------------------------------------------------------------------------------


def _page(seen: Inspection) -> Iterator[str]:
    dtypes = Counter(looks.rpartition(" ")[2] for looks in seen.tensors.values())
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    yield visible(seen.path)
    yield f"  written by: {seen.kind}"
    for key, value in list(seen.about.items())[:_SHOWN]:
        yield f"  {visible(key)}: {visible(value)[:200]}"
    yield f"  {len(seen.tensors)} tensors, {seen.values:,} values: {kinds}"
    yield from _list("tied in the file", [f"{a} = {b}" for a, b in seen.ties.items()])
    yield from _list(
        "not finite", [f"{n}: {count:,} values" for n, count in seen.nonfinite.items()]
    )
    if seen.model:
        yield from _page_of_model(seen)
    elif not seen.base:
        yield from _list("tensors", [f"{n} {looks}" for n, looks in seen.tensors.items()], most=60)
    if seen.base:
        yield from _page_of_base(seen)


def _page_of_model(seen: Inspection) -> Iterator[str]:
    yield ""
    fits = len(seen.tensors) - len(seen.unexpected) - len(seen.misshaped) - len(seen.added)
    yield f"beside {visible(seen.model)}: {fits} of {len(seen.tensors)} names and shapes fit"
    if seen.prefix:
        yield f"  all names have {visible(seen.prefix)!r} in front; compared without"
    yield from _list("added by the delta", seen.added)
    yield from _list("missing", seen.missing)
    yield from _list("unexpected", seen.unexpected)
    yield from _list("another shape", [f"{n}: {how}" for n, how in seen.misshaped.items()])
    yield from _list("resized on load", [f"{n}: {how}" for n, how in seen.resized.items()])
    yield from _list("tied in the model, different in the file", seen.untied)
    yield from _list("still at its initial value, though it trains", seen.initial)
    if seen.rename:
        pairs = ", ".join(f"{old!r}: {new!r}" for old, new in seen.rename.items())
        typed = f"{{{visible(pairs)}}}"
        ours = seen.kind == "ln.save_checkpoint"
        yield (
            f"  mend: ln.load_checkpoint(path, model, rename={typed})"
            if ours
            else (f"  the same under another name: {typed}")
        )


def _page_of_base(seen: Inspection) -> Iterator[str]:
    yield ""
    same = sum(value == 0 for value in seen.changed.values())
    yield f"beside {visible(seen.base)}: {same} of {len(seen.changed)} common tensors are equal"
    moved = sorted(((v, n) for n, v in seen.changed.items() if v), reverse=True)
    yield from _list("‖x − base‖ ÷ ‖base‖", [f"{v:.2e}  {n}" for v, n in moved])
    yield from _list("only here", seen.only_here)
    yield from _list("only in the base", seen.only_there)


def _list(title: str, lines: Sequence[str], most: int = _SHOWN) -> Iterator[str]:
    if not lines:
        return
    yield f"  {title}: {len(lines)}"
    yield from (f"    {visible(line)}" for line in lines[:most])
    if len(lines) > most:
        yield f"    … and {len(lines) - most} more; --format json lists all"


def run_inspect(
    path: Path,
    *,
    model: str | None = None,
    base: Path | None = None,
    format: str = "text",
    output: Path | None = None,
) -> int:
    """What ``learnables inspect`` does; the exit code: 0 clean, 1 something found, 2 could not run.

    Raises:
        LearnablesError: There is no such format, or a file or the factory is at fault.
    """
    import sys

    check_format(format, FORMATS)
    built: Any = None
    if model is not None:
        try:
            built = build(model)["model"]
        except UsersError as error:
            print(error.told, end="", file=sys.stderr)
            return 2
    seen = inspect_file(path, built, base, called=model or "")
    text = seen.to_json() if format == "json" else str(seen)
    put(f"{text}\n", output)
    return 0 if seen.ok else 1
