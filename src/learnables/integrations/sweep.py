"""The static audit over every architecture of an installed library: ``learnables sweep``."""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from torch import nn

from learnables.arguments import require_flag, require_text
from learnables.auditing.command import checked
from learnables.auditing.run import audit
from learnables.auditing.settings import read_settings
from learnables.auditing.writers import check_format, put
from learnables.entries import entries
from learnables.errors import LearnablesError
from learnables.integrations.architectures import LIBRARIES, Library
from learnables.policy.groups import param_groups
from learnables.policy.kinds import kind_of
from learnables.watching.sinks.escape import visible

FORMATS = ("text", "json")
_SHOWN = 5  # examples of a line


@final
@dataclass(frozen=True)
class Disagreement:
    """One kind of parameter in one class, decayed toward zero by one side only.

    Attributes:
        owner: The class of the module that owns it.
        local_name: Its name there.
        kind: What we take it for.
        decayed_by: ``"theirs"`` or ``"ours"``.
        models: Architectures that have it.
        parameters: How many there are in all of them.
        example: One of them, with its shape.
        in_each: Architecture → how many there are in it.
    """

    owner: str
    local_name: str
    kind: str
    decayed_by: str
    models: tuple[str, ...]
    parameters: int
    example: str
    in_each: dict[str, int]


@final
@dataclass
class Sweep:
    """What a sweep saw; ``print(sweep)`` is the page.

    Attributes:
        library: The library.
        audited: Names of the architectures.
        failed: Name → why it could not be built.
        findings: One dict a finding: architecture, code, severity, what, where, found.
        decay: Where the library's groups and ours disagree.
        seconds_building: Time that the library took.
        seconds_auditing: Time that we took.
    """

    library: str
    audited: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    decay: list[Disagreement] = field(default_factory=list)
    seconds_building: float = 0.0
    seconds_auditing: float = 0.0

    @property
    def ok(self) -> bool:
        """No finding of severity error or warning."""
        return not any(f["severity"] != "note" for f in self.findings)

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2, ensure_ascii=True)

    def __str__(self) -> str:
        """As text."""
        return "\n".join(_page(self))


def sweep(
    library: str,
    patterns: str | Sequence[str] = (),
    *,
    decay: bool = False,
    select: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
) -> Sweep:
    """Build each architecture on the meta device and audit it, without a step.

    Args:
        library: ``"timm"`` or ``"transformers"``.
        patterns: A glob over names, or several; for timm two models of each module when empty.
        decay: Compare the library's own optimizer groups with `ln.param_groups` too.
        select: Codes or names of rules, as in `ln.audit`.
        ignore: Likewise.

    Returns:
        What was seen, also of those that cannot be built from their defaults.

    Raises:
        MissingExtraError: The library is not installed.
        ArgumentError: A pattern is no text, or ``decay`` neither True nor False.
        SelectionError: No name fits.
        LearnablesError: There is no such library.
    """
    if not isinstance(library, str) or library not in LIBRARIES:
        raise LearnablesError(
            "this library is unknown", found=repr(library), wanted=", ".join(LIBRARIES)
        )
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        require_text(pattern, "patterns")
    require_flag(decay, "decay")
    known = LIBRARIES[library]()
    seen = Sweep(library)
    differing: defaultdict[tuple[str, str, str, str], list[tuple[str, str]]] = defaultdict(list)
    for architecture in known.architectures(patterns):
        began = time.perf_counter()
        try:
            model = architecture.build()
        except Exception as error:  # a stranger's constructor may raise whatever it likes
            seen.failed[architecture.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        built = time.perf_counter()
        report = audit(model, select=select, ignore=ignore)
        seen.findings += [
            {
                "architecture": architecture.name,
                "code": finding.code,
                "severity": finding.severity,
                "what": finding.what,
                "where": finding.where,
                "found": finding.found,
            }
            for finding in report.findings
        ]
        if decay:
            for key, example in _differences(known, model):
                differing[key].append((architecture.name, example))
        seen.audited.append(architecture.name)
        seen.seconds_building += built - began
        seen.seconds_auditing += time.perf_counter() - built
    seen.decay = [
        Disagreement(*key, tuple(each := Counter(m for m, _ in rows)), len(rows), rows[0][1], each)
        for key, rows in sorted(differing.items(), key=lambda item: (item[0][3], -len(item[1])))
    ]
    return seen


def _differences(
    library: Library, model: nn.Module
) -> Iterator[tuple[tuple[str, str, str, str], str]]:
    """(class, local name, kind, who decays it) and an example, for each parameter that differs."""
    theirs = library.decayed(model)
    groups = param_groups(model, lr=1e-3, weight_decay=0.05)
    ours = {name for g in groups if g["weight_decay"] for name in g["param_names"]}
    for entry in entries(model):
        if entry.trainable and (entry.name in theirs) != (entry.name in ours):
            by = "theirs" if entry.name in theirs else "ours"
            owner = type(entry.owner).__name__
            key = (owner, entry.local_name, kind_of(entry).name, by)
            yield key, f"{entry.name} {tuple(entry.shape)}"


def _page(seen: Sweep) -> Iterator[str]:
    yield (
        f"{seen.library}: {len(seen.audited)} architectures audited, {len(seen.failed)} cannot be "
        f"built from their defaults; {seen.seconds_building:.0f} s to build them, "
        f"{seen.seconds_auditing:.0f} s to audit them"
    )
    counts = Counter(f["severity"] for f in seen.findings)
    yield "findings: " + (
        ", ".join(f"{counts[s]} {s}" for s in ("error", "warning", "note") if counts[s]) or "none"
    )
    for finding in seen.findings:
        where = visible(", ".join(finding["where"][:3]))
        yield f"  {finding['architecture']}: {finding['code']} {visible(finding['what'])}: {where}"
    for by, title in (
        ("theirs", "decayed toward zero by its default groups, not by ours"),
        ("ours", "decayed toward zero by our groups, not by its own"),
    ):
        rows = [row for row in seen.decay if row.decayed_by == by]
        if not rows:
            continue
        total = sum(row.parameters for row in rows)
        models = {name for row in rows for name in row.models}
        yield ""
        yield f"{title}: {total} parameters in {len(models)} architectures"
        for row in rows:
            some = ", ".join(row.models[:_SHOWN]) + (" …" if len(row.models) > _SHOWN else "")
            line = f"  {row.owner}.{row.local_name} ({row.kind}): {row.parameters} in {some}"
            yield visible(line)
        yield from _by_architecture(rows)


def _by_architecture(rows: Sequence[Disagreement]) -> Iterator[str]:
    """One line each: how many, and which most."""
    yield "  by architecture:"
    for name in sorted({name for row in rows for name in row.in_each}):
        here = sorted(
            (
                (row.in_each[name], f"{row.owner}.{row.local_name}")
                for row in rows
                if name in row.models
            ),
            key=lambda one: (-one[0], one[1]),
        )
        some = ", ".join(f"{count} {what}" for count, what in here[:_SHOWN])
        more = f", and of {len(here) - _SHOWN} more kinds" if len(here) > _SHOWN else ""
        yield visible(f"    {name}: {sum(count for count, _ in here)} ({some}{more})")


def run_sweep(
    library: str,
    patterns: Iterable[str] = (),
    *,
    decay: bool = False,
    format: str = "text",
    output: Path | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> int:
    """What ``learnables sweep`` does; the exit code: 0 clean, 1 findings, 2 nothing could be built.

    Raises:
        LearnablesError: There is no such format.
    """
    check_format(format, FORMATS)
    settings = checked(read_settings(), select, ignore)
    seen = sweep(
        library,
        tuple(patterns),
        decay=decay,
        select=settings.select,
        ignore=settings.ignore,
    )
    text = seen.to_json() if format == "json" else str(seen)
    put(f"{text}\n", output)
    if not seen.audited:
        return 2
    return 0 if seen.ok else 1
