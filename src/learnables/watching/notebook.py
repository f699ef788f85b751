"""A run as notebooks show it: what is wrong, then one row per parameter with sparklines."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from learnables.watching.alarm import Alarm
from learnables.watching.encoding import Array
from learnables.watching.observation import CONSUMED, Observation
from learnables.watching.sinks.escape import html
from learnables.watching.spark import spark

_ROWS = 200
_INK = {"error": "#b3261e", "warning": "#8a5a00"}  # readable on light and on dark paper
_LEFT = ' style="text-align:left;vertical-align:top"'


class Shown(Protocol):
    """What is shown of a `learnables.watching.Run`."""

    damage: list[str]

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def alarms(self) -> Sequence[Alarm]:
        """What is wrong."""

    @property
    def parameters(self) -> Sequence[Any]:
        """Who was watched, by ``name`` and ``shape``."""

    @property
    def observations(self) -> Sequence[Observation]:
        """The looks."""

    @property
    def scalars(self) -> Mapping[str, Any]:
        """Series by name."""

    @property
    def gradient_norm(self) -> Any:
        """A series."""


def table(run: Shown) -> str:
    """A run as HTML: no script, no style sheet, nothing fetched.

    Args:
        run: The run; of more than 200 parameters those with alarms and the first are shown.
    """
    looks = f"{len(run.observations)} looks at {len(run.parameters)} parameters"
    said = [f"<p><b>{html(run.name)}</b>: {looks}</p>"]
    said += [f"<p>damaged: {html(line)}</p>" for line in run.damage]
    said += [
        f'<p><b style="color:{_INK[alarm.severity]}">{html(alarm.severity)}</b> '
        f"{'<br>'.join(html(line) for line in str(alarm).splitlines())}</p>"
        for alarm in run.alarms
    ]
    numbers = {CONSUMED: run.gradient_norm, **run.scalars}
    lines = [(name, series.values) for name, series in numbers.items() if len(series.values)]
    said.append(_rows(("", "last", ""), ((html(n), *_told(values)) for n, values in lines)))
    blamed = {alarm.name for alarm in run.alarms}
    names = sorted((p.name for p in run.parameters), key=lambda name: name not in blamed)
    head = ("parameter", "shape", "weight norm", "", "gradient norm", "", "update ratio", "")
    said.append(_rows(head, _parameters(run, names[:_ROWS])))
    if len(names) > _ROWS:
        said.append(f"<p>and {len(names) - _ROWS} more; ln.write_html(run, path) shows all</p>")
    return f"<div>{''.join(said)}</div>"


def _parameters(run: Shown, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    shapes = {p.name: " × ".join(map(str, p.shape)) or "scalar" for p in run.parameters}
    places = [{name: i for i, name in enumerate(o.names)} for o in run.observations]
    for name in names:
        seen = [(o, at[name]) for o, at in zip(run.observations, places, strict=True) if name in at]
        norms = [
            np.array([o.rows[q].norm[i] for o, i in seen if q in o.rows])
            for q in ("weight", "gradient")
        ]
        ratios = np.array([o.ratio[i] for o, i in seen])
        cells = [cell for values in (*norms, ratios) for cell in _told(values)]
        yield f"<code>{html(name)}</code>", html(shapes[name]), *cells


def _told(values: Array) -> tuple[str, str]:
    """The last number that there is, and how it came about."""
    known = values[~np.isnan(values)]
    return (f"{known[-1]:.4g}" if len(known) else "–"), spark(values.tolist())


def _rows(head: Sequence[str], rows: Iterator[tuple[str, ...]]) -> str:
    body = "".join(
        "<tr>" + "".join(f"<td{_LEFT}>{cell}</td>" for cell in row) + "</tr>" for row in rows
    )
    names = "".join(f"<th{_LEFT}>{name}</th>" for name in head)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>" if body else ""
