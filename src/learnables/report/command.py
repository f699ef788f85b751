"""What ``learnables report``, ``watch``, ``runs``, ``compare`` and ``export`` do."""

import sys
from pathlib import Path

from learnables.errors import LearnablesError, RunError
from learnables.report.content import content
from learnables.report.html import write_html
from learnables.watching.compare import compare
from learnables.watching.run import Run
from learnables.watching.sinks.base import Sink
from learnables.watching.sinks.escape import file_name, visible

FORMATS = ("tensorboard", "jsonl", "csv", "trackio", "wandb")


def write_report(path: Path, output: Path | None, fail_on: str | None) -> int:
    """Write the page; 1 where ``fail_on`` says that what is on it is a failure.

    Raises:
        LearnablesError: There is no such severity.
    """
    if fail_on not in (None, "error", "warning"):
        raise LearnablesError(
            "there is no such severity",
            where="--fail-on",
            found=f"--fail-on {fail_on}",
            wanted="error or warning",
            mend=f"learnables report {path} --fail-on error",
        )
    run = Run(path)
    if output is None:
        output = run.path.with_name("report.html" if run.path.stem == "run" else "report-2.html")
    write_html(run, output)
    page = content(run)
    print(f"{visible(str(output))}: {page.headline}")
    _say_damage(run)
    bad = {"error": ("error",), "warning": ("error", "warning")}.get(fail_on or "", ())
    return int(page.level in bad)


def watch_run(path: Path, port: int, terminal: bool) -> None:
    """Follow a run: in the browser, or in the terminal."""
    if terminal:
        from learnables.watching.terminal import follow

        try:
            follow(path)
        except KeyboardInterrupt:
            return
    else:
        from learnables.report.live import LivePage

        Run(path)  # an error now is better than an empty page
        page = LivePage(path, port)
        print(f"{page.address}  follows {visible(str(path))}; Ctrl-C ends it", flush=True)
        page.serve()


def list_runs(folder: Path) -> None:
    """Print one line for each run in and below ``folder``.

    Raises:
        LearnablesError: There is none.
    """
    from rich.console import Console

    from learnables.watching.terminal import table_of_runs

    found = sorted(folder.rglob("run*.db"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise LearnablesError(
            "there is no run here",
            where=str(folder),
            found="no run*.db in it" if folder.is_dir() else "no such folder",
            wanted="a folder that ln.watch(..., to=...) wrote to",
            mend="learnables runs runs",
        )
    Console().print(table_of_runs(found))


def print_comparison(one: Path, other: Path) -> int:
    """Print which parameters of two runs differ; 1 where any does."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    a, b = Run(one), Run(other)
    found = compare(a, b)
    console = Console()
    names = f"{visible(a.name)} and {visible(b.name)}"
    console.print(Text(f"{names}: {len(found.steps)} looks in common"))
    for run in (a, b):
        _say_damage(run)
    if found.scalars:
        numbers = Table("number", "A", "B", box=None, pad_edge=False, header_style="dim")
        for name, (x, y) in found.scalars.items():
            numbers.add_row(Text(visible(name)), f"{x:.6g}", f"{y:.6g}")
        console.print(numbers)
    if not found.differences:
        console.print(f"all {found.alike} parameters are equal in every recorded number")
        return 0
    table = Table("parameter", "differs in", "since step", "‖weight‖ in A", "in B", box=None)
    for d in found.differences:
        norms = ("", "") if d.norms is None else (f"{d.norms[0]:.6g}", f"{d.norms[1]:.6g}")
        since = "" if d.since is None else str(d.since)
        table.add_row(Text(visible(d.name)), d.what, since, *norms)
    console.print(table)
    console.print(f"{len(found.differences)} parameters differ, {found.alike} are alike")
    return 1


def export_run(path: Path, form: str, output: Path | None) -> None:
    """Hand a whole run to a sink.

    Raises:
        LearnablesError: There is no such format.
        RunError: What is exported cannot be written.
    """
    if form not in FORMATS:
        raise LearnablesError(
            "there is no such format",
            where="--to",
            found=f"--to {form}",
            wanted=", ".join(FORMATS),
            mend=f"learnables export {path} --to {FORMATS[0]}",
        )
    run = Run(path)
    ending = {"tensorboard": "-tensorboard", "jsonl": ".jsonl", "csv": ".csv"}.get(form, "")
    output = output or run.path.with_name(run.path.stem + ending)
    try:
        _pour(run, _sink(form, output, run))
    except OSError as error:
        raise RunError(
            "what is exported cannot be written",
            where=str(output),
            found=f"{type(error).__name__}: {error}",
            wanted="a place that can be written to",
            mend=f"learnables export {path} --to {form} --output another/place",
        ) from error
    print(f"{visible(str(output)) if ending else form}: {len(run.observations)} looks")
    _say_damage(run)


def _pour(run: Run, sink: Sink) -> None:
    for observation in run.observations:
        sink.observation(observation)
    for name, series in run.scalars.items():
        for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
            sink.scalars(step, {name: value})
    for alarm in run.alarms:
        sink.alarm(alarm)
    sink.close()


def _sink(form: str, output: Path, run: Run) -> Sink:
    if form == "tensorboard":
        from learnables.watching.sinks.tensorboard import TensorBoard

        return TensorBoard(output)
    if form in ("jsonl", "csv"):
        from learnables.watching.sinks.csv import CSV
        from learnables.watching.sinks.jsonl import JSONLines

        output.unlink(missing_ok=True)
        return JSONLines(output) if form == "jsonl" else CSV(output)
    if form == "trackio":
        from learnables.watching.sinks.trackio import Trackio

        return Trackio(project="learnables", name=file_name(run.name))
    from learnables.watching.sinks.wandb import WeightsAndBiases

    return WeightsAndBiases(project="learnables", name=file_name(run.name))


def _say_damage(run: Run) -> None:
    for line in run.damage[:5]:
        print(f"damaged: {visible(line)}", file=sys.stderr)
