"""What the page shows: a plain function of a run, an audit's report, or both."""

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from learnables.errors import RunError
from learnables.report.figures import Figures
from learnables.watching.artifacts import labels_of
from learnables.watching.encoding import Array
from learnables.watching.observation import CONSUMED, QUANTITIES, Observation
from learnables.watching.run import Artifact, Described, Run, Series

POINTS = 160  # of a line: as many as a chart of this size can show
COLUMNS = 64  # of a heat map over time
SHADES = 40  # of a heat map; the page's script knows this number
_SEVERITIES = ("error", "warning", "note")
_PICTURED = 96  # largest side of a matrix that is shown as an image
_MAPPED = 40_000  # values of all maps of a picture together
_GALLERY = 120_000  # bytes of the images of a gallery together
_SHOWN = 48, 24  # images of a gallery: as they are, or of those that have to be shrunk


@dataclass(frozen=True)
class Issue:
    """One thing that is wrong, whoever found it."""

    severity: str
    code: str
    what: str
    where: str = ""
    found: str = ""
    wanted: str = ""
    mend: str = ""
    at: str = ""


@dataclass
class Row:
    """One parameter in the table."""

    name: str
    also: tuple[str, ...] = ()
    shape: str = ""
    numel: int = 0
    dtype: str = ""
    kind: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    weight: float | None = None
    gradient: float | None = None
    ratio: float | None = None
    lost: float | None = None
    defect: float | None = None
    issues: list[int] = field(default_factory=list)

    @property
    def severity(self) -> str:
        """The worst of its issues is put here by `content`."""
        return self._severity

    _severity: str = ""


@dataclass
class Content:
    """Everything on the page; texts are raw and are escaped where they are written."""

    title: str
    issues: list[Issue] = field(default_factory=list)
    clean: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    tiles: list[dict[str, Any]] = field(default_factory=list)
    charts: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    observed: bool = False
    pictures: list[dict[str, Any]] = field(default_factory=list)
    gallery: list[dict[str, Any]] = field(default_factory=list)
    documents: list[tuple[str, str]] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    figures: Figures = field(default_factory=Figures)
    index: dict[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> str:
        """``"error"``, ``"warning"`` or ``"good"``."""
        found = {issue.severity for issue in self.issues}
        return next((s for s in ("error", "warning") if s in found), "good")

    @property
    def headline(self) -> str:
        """The verdict in a few words."""
        counts = [(sum(i.severity == s for i in self.issues), s) for s in _SEVERITIES]
        said = [f"{n} {s}{'s' * (n != 1)}" for n, s in counts if n]
        return (
            " and ".join([", ".join(said[:-1]), said[-1]]).removeprefix(" and ")
            if said
            else ("Nothing found wrong")
        )


def content(run: Run | None, report: Mapping[str, Any] | None = None) -> Content:
    """Everything that the page shows.

    Args:
        run: A run, or None for an audit's report alone.
        report: What ``report.to_dict()`` gives; that stored in the run where None.
    """
    if run is None:
        page = Content(title="Audit")
        _add_audit(page, report or {})
        _add_audited_rows(page, report or {})
        _mark_rows(page)
        return page
    page = Content(title=run.name)
    stored = run.artifact("audit")
    if report is None and stored is not None:
        report = _document(stored, page)
    if report:
        _add_audit(page, report)
    _add_alarms(page, run)
    _add_facts(page, run)
    _add_scalars(page, run)
    _add_parameters(page, run)
    _add_artifacts(page, run)
    _mark_rows(page)
    page.damage = list(run.damage)
    return page


# --- what is wrong -------------------------------------------------------------------------------


def _add_audit(page: Content, report: Mapping[str, Any]) -> None:
    for finding in report.get("findings", ()):
        page.issues.append(
            Issue(
                severity=str(finding.get("severity") or "warning"),
                code=" ".join(filter(None, (finding.get("code"), finding.get("name")))),
                what=str(finding.get("what", "")),
                where=", ".join(map(str, finding.get("where") or ())),
                found=str(finding.get("found", "")),
                wanted=str(finding.get("wanted", "")),
                mend=str(finding.get("mend", "")),
                at=str(finding.get("location") or ""),
            )
        )
    looked = len(report.get("parameters", ()))
    skipped = report.get("skipped") or {}
    page.clean = f"The audit looked at {looked} parameters"
    page.clean += f"; {len(skipped)} rules could not judge." if skipped else "."
    if skipped:
        lines = "\n".join(f"{code}: {reason}" for code, reason in skipped.items())
        page.documents.append(("Rules that could not judge", lines))


def _add_alarms(page: Content, run: Run) -> None:
    for alarm in run.alarms:
        page.issues.append(
            Issue(
                severity=alarm.severity,
                code=alarm.kind,
                what=alarm.what,
                where=alarm.name,
                found=alarm.found,
                wanted=alarm.wanted,
                mend=alarm.mend,
                at=f"step {alarm.step}" + ("" if alarm.rank is None else f", rank {alarm.rank}"),
            )
        )
    page.issues.sort(key=lambda issue: _SEVERITIES.index(issue.severity))


def _mark_rows(page: Content) -> None:
    by_name = {name: row for row in page.rows for name in (row.name, *row.also)}
    for number, issue in enumerate(page.issues):
        for name in issue.where.split(", "):
            row = by_name.get(name)
            if row is not None and number not in row.issues:
                row.issues.append(number)
                row._severity = row._severity or issue.severity


# --- numbers over the whole run ------------------------------------------------------------------


def _add_facts(page: Content, run: Run) -> None:
    started = float(run.meta.get("started", 0.0))
    page.facts = [
        ("started", time.strftime("%Y-%m-%d %H:%M", time.localtime(started))),
        ("ran for", _duration(run.seconds)),
        ("steps", f"{run.steps:,}".replace(",", " ")),
        ("parameters", f"{len(run.parameters)} ({_count(sum(p.numel for p in run.parameters))})"),
        ("looks", str(len(run.observations))),
    ]
    cost = run.meta.get("overhead")
    if isinstance(cost, float):
        page.facts.append(("watching cost", f"{cost:.2%} of the training time"))
    skips = max(sum(o.skips for o in run.observations), len(run.overflows))
    if skips:
        blamed = Counter(name for names in run.overflows.values() for name in names)
        worst = "".join(f", {name} in {times}" for name, times in blamed.most_common(1))
        page.facts.append(("skipped steps", f"{skips}{worst}"))
    number = len(run.observations)
    looks = f"No alarm in {number} look{'s' * (number != 1)}."
    page.clean = f"{page.clean} {looks}".strip()


def _add_scalars(page: Content, run: Run) -> None:
    groups: dict[str, dict[str, Series]] = {}
    for name, series in run.scalars.items():
        groups.setdefault(name.split("/")[0], {})[name] = series
    if len(run.gradient_norm.steps) > 1:
        groups[CONSUMED] = {CONSUMED: run.gradient_norm}
    order = sorted(groups, key=lambda g: (not g.startswith("acc"), not g.startswith("loss"), g))
    for group in order:
        lines = []
        for name, series in groups[group].items():
            steps, values = thin(series.steps, series.values, 400)
            label = name.split("/", 1)[1] if "/" in name else name
            lines.append(
                {
                    "label": label,
                    "x": page.figures.add(steps.astype("<f4")),
                    "y": page.figures.add(values.astype("<f4")),
                }
            )
            if len(page.tiles) < 6:
                page.tiles.append(
                    {
                        "name": name.replace("/", " · "),
                        "value": _short(float(series.values[-1])),
                        "line": lines[-1]["y"],
                    }
                )
        positive = all((s.values[np.isfinite(s.values)] > 0).all() for s in groups[group].values())
        wide = positive and _spread(groups[group].values()) > 30
        page.charts.append({"title": group, "log": bool(wide), "lines": lines})


def _spread(series: Iterable[Series]) -> float:
    values = np.concatenate([s.values[np.isfinite(s.values)] for s in series])
    return float(values.max() / values.min()) if len(values) and values.min() > 0 else 1.0


def thin(steps: Array, values: Array, points: int) -> tuple[Array, Array]:
    """At most ``points`` of a series: of each stretch its lowest and its highest value."""
    if len(steps) <= points:
        return steps, values
    kept: list[int] = [0]
    for part in np.array_split(np.arange(len(steps)), points // 2):
        filled = np.where(np.isfinite(values[part]), values[part], np.inf)
        low = part[int(filled.argmin())]
        high = part[int(np.where(np.isfinite(values[part]), values[part], -np.inf).argmax())]
        kept += [int(low), int(high)]
    at = np.unique([*kept, len(steps) - 1])
    return steps[at], values[at]


# --- one row per parameter -----------------------------------------------------------------------


def _add_parameters(page: Content, run: Run) -> None:
    seen = run.observations
    page.observed = bool(seen)
    rows = {p.name: _described(p) for p in run.parameters}
    page.rows = list(rows.values())
    if not seen:
        return
    groups = [list(part) for part in np.array_split(np.arange(len(seen)), min(POINTS, len(seen)))]
    wide = [list(part) for part in np.array_split(np.arange(len(seen)), min(COLUMNS, len(seen)))]
    where = [{name: i for i, name in enumerate(o.names)} for o in seen]
    figures = page.figures
    lines: list[dict[str, int]] = []
    for row in page.rows:
        told = _lines(seen, where, row)
        lines.append(
            {
                key: figures.add(encode_log(_largest(values, groups)))
                for key, values in told.items()
                if np.isfinite(values).any()
            }
        )
    heat: list[dict[str, Any]] = [{} for _ in page.rows]
    for quantity in QUANTITIES:
        counts = _counts(seen, wide, {row.name: i for i, row in enumerate(page.rows)}, quantity)
        for i, chart in enumerate(map(_heat, counts)):
            if chart is not None:
                low, high, cells = chart
                heat[i][quantity] = [low, high, figures.add(cells)]
    page.index = {
        "steps": figures.add(np.array([seen[g[-1]].step for g in groups], "<f4")),
        "heatSteps": figures.add(np.array([seen[g[-1]].step for g in wide], "<f4")),
        "lines": lines,
        "heat": heat,
    }


def _described(p: Described) -> Row:
    policy = dict(p.policy)
    row = Row(
        name=p.name,
        also=p.names[1:],
        shape=" × ".join(map(str, p.shape)) or "scalar",
        numel=p.numel,
        dtype=p.dtype,
        kind=str(policy.pop("kind", "")),
    )
    row.facts = [(key.replace("_", " "), str(value)) for key, value in policy.items()]
    if row.also:
        row.facts.append(("tied to", ", ".join(row.also)))
    return row


def _lines(
    seen: Sequence[Observation], where: Sequence[Mapping[str, int]], row: Row
) -> dict[str, Array]:
    """Norms, ratio and columns of one parameter at each observation.

    ``row`` gets the last of each, and the median of the ratio.
    """
    told = {
        key: np.full(len(seen), np.nan)
        for key in ("weight", "gradient", "update", "ratio", "lost", "defect", "lr")
    }
    for t, o in enumerate(seen):
        i = where[t].get(row.name)
        if i is None:
            continue
        for quantity, rows in o.rows.items():
            told[quantity][t] = rows.norm[i]
        told["ratio"][t] = o.ratio[i]
        for name in ("lost", "defect", "lr"):
            if name in o.columns:
                told[name][t] = o.columns[name][i]
    for key in ("lost", "defect"):
        finite = told[key][np.isfinite(told[key])]
        setattr(row, key, float(finite[-1]) if len(finite) else None)
    for key in ("weight", "gradient"):
        last = next((o for o in reversed(seen) if key in o.rows and row.name in o.names), None)
        if last is not None and last.rows[key].present[last.names.index(row.name)]:
            setattr(row, key, float(last.rows[key].norm[last.names.index(row.name)]))
    ratios = told["ratio"][np.isfinite(told["ratio"])]  # the last is 0 wherever lr ends at 0
    row.ratio = float(np.median(ratios)) if len(ratios) else None
    return told


def _largest(values: Array, groups: Sequence[Sequence[int]]) -> Array:
    """The largest value of each group: a spike must not vanish between two points."""
    filled = np.where(np.isfinite(values), values, -np.inf)
    found = np.array([filled[list(group)].max() for group in groups])
    return np.where(np.isfinite(found), found, np.nan)


def encode_log(values: Array) -> Array:
    """Non-negative numbers in two bytes each, to 0.3 %: 0 for none, 1 for zero, then log2."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.clip(np.log2(values), -160.0, 160.0)
    code = np.round((logs + 160.0) / 320.0 * 65533.0) + 2.0
    code = np.where(values == 0, 1, code)
    return np.where(np.isfinite(values), code, 0).astype("<u2")


def _counts(
    seen: Sequence[Observation],
    groups: Sequence[Sequence[int]],
    row_of: Mapping[str, int],
    quantity: str,
) -> Array:
    """Histograms of magnitudes, summed over each group: shape (parameters, groups, 258).

    Of the last dimension, 0 counts zeros, 1 + k what has the exponent k, 257 what is not finite.
    """
    counts = np.zeros((len(row_of), len(groups), 258), np.int64)
    for t, group in enumerate(groups):
        for o in (seen[at] for at in group):
            rows = o.rows.get(quantity)
            if rows is None or rows.filled is None:
                continue
            to = np.array([row_of[name] for name in o.names])
            exponents = rows.filled.bins & 255
            at = (to[rows.filled.rows], t, 1 + exponents.astype(np.int64))
            np.add.at(counts, at, rows.filled.counts.astype(np.int64))  # type: ignore[arg-type]
            for name, place, other in (("zeros", 0, 1), ("nonfinite", 257, 256)):
                number = rows.moments[name].astype(np.int64)
                counts[to, t, place] += number
                counts[to, t, other] -= number
    return counts


def _heat(counts: Array) -> tuple[int, int, Array] | None:
    """Lowest and highest exponent, and shares on a log scale; None where nothing was counted.

    Args:
        counts: Shape (times, 258), as `_counts` has them.

    Returns:
        The exponents of 2, and bytes of shape (zeros + exponents + non-finite, times).
    """
    if not counts.any():
        return None
    filled = np.flatnonzero(counts[:, 1:257].any(axis=0))
    low, high = (int(filled[0]), int(filled[-1])) if len(filled) else (127, 127)
    kept = np.concatenate([counts[:, :1], counts[:, 1 + low : 2 + high], counts[:, 257:]], axis=1)
    total = np.maximum(kept.sum(axis=1, keepdims=True), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shade = SHADES + 2 * np.log2(kept / total)  # half doublings: down to one in a million
    cells = np.where(kept > 0, np.clip(np.round(shade), 1, SHADES), 0).astype(np.uint8)
    return low - 127, high - 127, np.ascontiguousarray(cells.T)  # along time, to compress well


def _add_audited_rows(page: Content, report: Mapping[str, Any]) -> None:
    for p in report.get("parameters", ()):
        row = Row(
            name=str(p.get("name")),
            shape=" × ".join(map(str, p.get("shape") or ())) or "scalar",
            dtype=str(p.get("dtype", "")),
            weight=p.get("value_after"),
            gradient=p.get("gradient_last"),
            ratio=p.get("ratio"),
        )
        row.numel = math.prod(p.get("shape") or (1,))
        told = ("trainable", "groups", "moved")
        row.facts = [(key, str(p[key])) for key in told if key in p]
        page.rows.append(row)


# --- pictures and documents ----------------------------------------------------------------------


def _add_artifacts(page: Content, run: Run) -> None:
    latest: dict[str, Artifact] = {}
    for artifact in run.artifacts:
        latest.pop(artifact.name, None)
        latest[artifact.name] = artifact
    classes = latest.pop("classes", None)
    names = _document(classes, page) if classes is not None else None
    for artifact in latest.values():
        try:
            if artifact.kind == "table":
                values = artifact.arrays()["values"].astype(np.float32)
                _add_table(page, artifact, values, names)
            elif artifact.kind == "images":
                _add_images(page, artifact)
            elif artifact.name != "audit":
                text = json.dumps(_document(artifact, page), indent=2, ensure_ascii=False)
                page.documents.append((artifact.name, text))
        except (RunError, KeyError, ValueError) as error:
            page.damage.append(f"{artifact.name}: {error}")


def _add_table(page: Content, artifact: Artifact, values: Array, classes: Any) -> None:
    if values.ndim != 4:
        values = values.reshape(values.shape[0] if values.ndim > 1 else 1, -1)
    whole = list(values.shape)
    if values.ndim == 4:
        step = [max(1, math.ceil(math.sqrt(values.size / _MAPPED)))] * 2
        form = "maps"
    else:
        step = [max(1, math.ceil(side / _PICTURED)) for side in whole]
        form = "confusion" if artifact.name == "confusion" else "matrix"
    values = values[:: step[0], :: step[1]]
    picture: dict[str, Any] = {"form": form, "shape": list(values.shape), "whole": whole}
    alike = isinstance(classes, list) and len(classes) == values.shape[0]
    if form == "confusion" and alike:
        picture["labels"] = [str(name) for name in classes]
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    small = values.size <= 400
    scale = (high - low) or 1.0
    coded = np.clip(np.nan_to_num((values - low) / scale) * 255, 0, 255).astype(np.uint8)
    picture |= {
        "title": artifact.name,
        "step": artifact.step,
        "low": low,
        "high": high,
        "exact": small,
        "data": page.figures.add(values.astype("<f4") if small else coded),
    }
    page.pictures.append(picture)


def _add_images(page: Content, artifact: Artifact) -> None:
    arrays = artifact.arrays()
    pixels, labels = thumbnails(arrays["pixels"]), labels_of(arrays)
    page.gallery.append(
        {
            "title": artifact.name,
            "step": artifact.step,
            "shape": list(pixels.shape),
            "labels": labels[: len(pixels)],
            "data": page.figures.add(pixels),
        }
    )


def thumbnails(pixels: Array) -> Array:
    """The first images, as they are or so small that a page has room for them.

    Args:
        pixels: uint8 of shape (N, H, W, C).

    Returns:
        At most 48 of them, or 24 that are shrunk: each pixel is the mean of a square.
    """
    many, few = _SHOWN
    if pixels[:many].nbytes <= _GALLERY:
        return pixels[:many]
    number, height, width, channels = pixels[:few].shape
    sizes = ((n, max(1, height // n), max(1, width // n)) for n in itertools.count(1))
    room = _GALLERY // (number * channels)
    square, height, width = next(size for size in sizes if size[1] * size[2] <= room)
    cut = pixels[:few, : height * square, : width * square].astype(np.float32)
    squares = cut.reshape(number, height, -1, width, cut.shape[2] // width, channels)
    return np.asarray(squares.mean(axis=(2, 4)).round().astype(np.uint8))


def _document(artifact: Artifact, page: Content) -> Any:
    try:
        return artifact.document()
    except RunError as error:
        page.damage.append(f"{artifact.name}: {error.found}")
        return None


# --- words for numbers ---------------------------------------------------------------------------


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _count(number: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit} values"
    return f"{number} values"


def _short(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.4g}"
