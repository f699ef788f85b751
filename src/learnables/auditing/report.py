"""What an audit found, in the forms a person or a program wants it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from learnables._torch import dtype_name
from learnables.auditing import writers
from learnables.auditing.evidence import Amount, Evidence
from learnables.auditing.rule import SEVERITIES, Finding
from learnables.errors import AuditFailed
from learnables.watching.sinks.escape import visible


@dataclass(frozen=True)
class ParameterRow:
    """One parameter in ``report.parameters``.

    Attributes:
        name: Qualified name.
        shape: Shape.
        dtype: Storage dtype, e.g. ``float32``.
        trainable: Whether it asks for a gradient.
        groups: In how many optimizer groups it sits.
        value_before: ‖value‖₂ before the first observed iteration.
        value_after: ‖value‖₂ after the last.
        gradient_first: ‖gradient‖₂ that the first step consumed; None where there was none.
        gradient_last: The same for the last iteration.
        update: ‖value after − value before‖₂ over all iterations; None beyond the memory budget.
        ratio: ``update / value_before``; None where it would be 0/0 or unknown.
        moved: In how many iterations an optimizer step changed it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    groups: int
    value_before: float | None = None
    value_after: float | None = None
    gradient_first: float | None = None
    gradient_last: float | None = None
    update: float | None = None
    ratio: float | None = None
    moved: int = 0


@final
class ParameterTable(list[ParameterRow]):
    """The rows of ``report.parameters``; printed, they are a table."""

    _HEAD = ("", "shape", "value", "gradient", "update", "ratio", "moved")

    def __str__(self) -> str:
        """One line a parameter: ‖value‖ and ‖gradient‖ first → last, ‖update‖, ratio, moves."""
        lines = [self._HEAD, *map(_cells, self)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self._HEAD))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def _cells(row: ParameterRow) -> tuple[str, ...]:
    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.3g}"

    def pair(first: float | None, last: float | None) -> str:
        return number(first) if first is last is None else f"{number(first)} → {number(last)}"

    return (
        visible(row.name),
        "×".join(map(str, row.shape)) or "scalar",
        pair(row.value_before, row.value_after),
        pair(row.gradient_first, row.gradient_last),
        number(row.update),
        number(row.ratio),
        str(row.moved),
    )


@final
class Report:
    """The result of `ln.audit` and `ln.observe`.

    Attributes:
        findings: All findings, errors first, then warnings, then notes.
        skipped: Rule code → why it could not judge.
        parameters: One `ParameterRow` per registered parameter; printed, a table.
        not_restored: What the audit could not put back, in words.
        silenced: Finding → the reason it was declared to be meant.
        iterations: How many iterations were observed.
        crashed: The error that a step raised, if one did.
    """

    def __init__(
        self,
        findings: Sequence[Finding],
        *,
        skipped: Mapping[str, str] | None = None,
        parameters: Sequence[ParameterRow] = (),
        not_restored: Sequence[str] = (),
        silenced: Sequence[tuple[Finding, str]] = (),
        iterations: int = 0,
        crashed: BaseException | None = None,
    ) -> None:
        order = {severity: i for i, severity in enumerate(SEVERITIES)}
        self.findings = sorted(findings, key=lambda f: (order[f.severity or "note"], f.code))
        self.skipped = dict(skipped or {})
        self.parameters = ParameterTable(parameters)
        self.not_restored = list(not_restored)
        self.silenced = list(silenced)
        self.iterations = iterations
        self.crashed = crashed

    @property
    def ok(self) -> bool:
        """No finding of severity error or warning."""
        return all(f.severity == "note" for f in self.findings)

    @property
    def codes(self) -> list[str]:
        """The codes of all findings, each once, sorted."""
        return sorted({f.code for f in self.findings})

    def raise_for_errors(self) -> None:
        """Do nothing where no finding is an error.

        Raises:
            AuditFailed: One is; the message holds all of them.
        """
        errors = [f for f in self.findings if f.severity == "error"]
        if errors:
            raise AuditFailed(
                "\n".join(map(str, errors)), found=f"{len(errors)} errors", wanted="none"
            )

    def to_json(self) -> str:
        """The whole report as one JSON object; keys as the attributes are called."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def to_sarif(self) -> str:
        """The report as SARIF 2.1.0, which code-scanning services read."""
        return writers.sarif(self)

    def to_dict(self) -> dict[str, Any]:
        """What `to_json` writes, as plain data; numbers that JSON lacks become None."""
        return {
            "ok": self.ok,
            "iterations": self.iterations,
            "findings": [as_dict(f) for f in self.findings],
            "skipped": self.skipped,
            "silenced": [{**as_dict(f), "reason": reason} for f, reason in self.silenced],
            "parameters": [_finite(asdict(row)) for row in self.parameters],
            "not_restored": self.not_restored,
            "crashed": None if self.crashed is None else repr(self.crashed),
        }

    def __str__(self) -> str:
        """Findings in the five-part form, then one line of counts."""
        return writers.text(self).rstrip("\n")

    def _repr_html_(self) -> str:
        """The table that notebooks show."""
        return writers.notebook(self)

    @property
    def summary(self) -> str:
        """One line: how much was looked at, and how many findings there are."""
        counts = {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES}
        found = ", ".join(_many(n, s) for s, n in counts.items() if n) or "clean"
        seen = (
            _many(self.iterations, "observed iteration") if self.iterations else "no step observed"
        )
        skipped = f", {_many(len(self.skipped), 'rule')} skipped" if self.skipped else ""
        return f"{found}; {_many(len(self.parameters), 'parameter')}, {seen}{skipped}"

    def __repr__(self) -> str:
        """The summary."""
        return f"<Report: {self.summary}>"


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


def as_dict(finding: Finding) -> dict[str, Any]:
    """A finding as plain data, with the source line it quotes."""
    return {**asdict(finding), "quote": finding.quote}


def parameter_rows(evidence: Evidence) -> list[ParameterRow]:
    """The table of values and gradients before and after, one row per parameter."""
    rows = []
    for entry in evidence.entries:
        looks = evidence.looks_at(entry)
        gradients = [look.gradient for look in looks if look.gradient is not None]
        before, after = evidence.first.get(entry.param), evidence.last.get(entry.param)
        value = update = None
        if before is not None:
            value = float(before.float().norm()) if before.dtype.is_floating_point else None
        if before is not None and after is not None and before.shape == after.shape:
            update = float((after.float() - before.float()).norm())
        rows.append(
            ParameterRow(
                name=entry.name,
                shape=tuple(entry.shape) if evidence.has_shape(entry) else (),
                dtype=dtype_name(entry.dtype),
                trainable=entry.trainable,
                groups=len(evidence.groups_of(entry)),
                value_before=value,
                value_after=_norm(looks[-1].value) if looks else value,
                gradient_first=_norm(gradients[0]) if gradients else None,
                gradient_last=_norm(gradients[-1]) if gradients else None,
                update=update,
                ratio=update / value if update is not None and value else None,
                moved=sum("step" in look.changes for look in looks),
            )
        )
    return rows


def _norm(amount: Amount | None) -> float | None:
    if amount is None:
        return None
    return float("nan") if amount.nonfinite else amount.norm


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
