"""`learnables.write_html`: one offline page."""

import os
from pathlib import Path
from typing import Any

from learnables.watching.run import Run
from learnables.watching.sinks.escape import html


def write_html(run_or_report: "Run | str | os.PathLike[str] | Any", path: "str | Path") -> Path:
    """Write one HTML file that needs no network and nothing beside it.

    Args:
        run_or_report: A `learnables.watching.Run`, a run's folder or file, or an audit's report.
        path: The file to write; replaced whole or not at all.

    Returns:
        The path.

    Raises:
        RunError: The run cannot be read.
    """
    if isinstance(run_or_report, (str, os.PathLike)):
        run_or_report = Run(run_or_report)
    body = _run(run_or_report) if isinstance(run_or_report, Run) else html(str(run_or_report))
    path = Path(path)
    draft = path.with_name(path.name + ".part")
    draft.write_text(
        "<!doctype html><meta charset=utf-8><title>learnables</title>"
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">" + body,
        encoding="utf-8",
    )
    draft.replace(path)
    return path


def _run(run: Run) -> str:
    alarms = "".join(f"<li><pre>{html(str(a))}</pre>" for a in run.alarms) or "<li>none"
    last = {n: s.values[-1] for n, s in run.scalars.items()}
    scalars = "".join(f"<li>{html(n)}: {v:.6g}" for n, v in last.items())
    names = "".join(f"<li>{html(p.name)} {p.shape}" for p in run.parameters)
    return (
        f"<h1>{html(run.name)}</h1><h2>Alarms</h2><ul>{alarms}</ul><h2>Scalars</h2>"
        f"<ul>{scalars}</ul><h2>Parameters</h2><ul>{names}</ul>"
    )
