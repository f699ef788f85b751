"""A run in a terminal: its state in one screen, drawn again as it goes on."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from learnables.errors import LearnablesError
from learnables.watching.observation import CONSUMED
from learnables.watching.run import Run, Series
from learnables.watching.sinks.escape import visible
from learnables.watching.spark import spark

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


def screen(run: Run, rows: int = 20) -> "RenderableType":
    """The state of a run as something that rich prints.

    Args:
        run: The run.
        rows: At most so many parameters: those with alarms first, then the fastest.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    last = run.observations[-1] if run.observations else None
    head = Text(visible(run.name), style="bold")
    head.append(f"   step {run.steps}, {len(run.observations)} looks", style="dim")
    parts: list[RenderableType] = [head]
    for alarm in run.alarms[-5:]:
        style = "bold red" if alarm.severity == "error" else "yellow"
        line = Text(f"{alarm.severity}: {alarm.kind}: {visible(alarm.what)}", style=style)
        line.append(f"  {visible(alarm.name)}, step {alarm.step}", style="default")
        parts.append(line)
    for damaged in run.damage[:3]:
        parts.append(Text(f"damaged: {visible(damaged)}", style="bold red"))
    numbers = Table(box=None, pad_edge=False, show_header=False)
    for name, series in {**run.scalars, CONSUMED: run.gradient_norm}.items():
        if len(series.values):
            shown = Text(spark(series.values.tolist(), 40), style="cyan")
            numbers.add_row(Text(visible(name)), f"{series.values[-1]:.4g}", shown)
    parts.append(numbers)
    if last is not None:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("parameter", "‖weight‖", "‖gradient‖", "ratio", ""):
            table.add_column(title, justify="left" if title in ("parameter", "") else "right")
        wrong = {alarm.name for alarm in run.alarms}
        speed = np.nan_to_num(last.ratio, nan=-1.0)
        order = sorted(
            range(len(last.names)), key=lambda i: (last.names[i] not in wrong, -speed[i])
        )
        for i in order[:rows]:
            name = last.names[i]
            ratios = [o.ratio[o.names.index(name)] for o in run.observations if name in o.names]
            table.add_row(
                Text(visible(name), style="red" if name in wrong else ""),
                *(
                    f"{last.rows[q].norm[i]:.3g}" if q in last.rows else "–"
                    for q in ("weight", "gradient")
                ),
                f"{last.ratio[i]:.1e}",
                Text(spark(ratios, log=True), style="cyan"),
            )
        parts.append(table)
        if len(order) > rows:
            parts.append(Text(f"… and {len(order) - rows} more", style="dim"))
    return Group(*parts)


def follow(path: Path, seconds: float = 2.0, times: int | None = None) -> None:
    """Draw the screen of a run again and again, until interrupted.

    Args:
        path: The run.
        seconds: Between two drawings.
        times: Stop after so many; None for never.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console()
    rows = max(5, console.height - 14)
    with Live(screen(Run(path), rows), console=console, screen=times is None) as live:
        drawn = 1
        while times is None or drawn < times:
            time.sleep(seconds)
            live.update(screen(Run(path), rows), refresh=True)
            drawn += 1


def table_of_runs(folders: Iterable[Path]) -> "RenderableType":
    """One line for each run: when, how far, the last numbers, what is wrong."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("run", "started", "steps", "looks", "numbers", "state"):
        table.add_column(title, justify="right" if title in ("steps", "looks") else "left")
    for folder in folders:
        try:
            run = Run(folder)
            steps = run.steps
        except LearnablesError as error:
            table.add_row(Text(visible(str(folder))), "", "", "", "", Text(error.what, style="red"))
            continue
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.meta.get("started", 0)))
        chosen = _headline(run.scalars)
        numbers = ", ".join(f"{visible(name)} {s.values[-1]:.4g}" for name, s in chosen.items())
        looks, state = str(len(run.observations)), _state(run)
        table.add_row(Text(visible(run.name)), started, str(steps), looks, Text(numbers), state)
    return table


def _state(run: Run) -> "Text":
    from rich.text import Text

    if run.damage:
        return Text("damaged", style="red")
    for severity, style in (("error", "red"), ("warning", "yellow")):
        number = sum(alarm.severity == severity for alarm in run.alarms)
        if number:
            return Text(f"{number} {severity}{'s' * (number != 1)}", style=style)
    return Text("good", style="green")


def _headline(scalars: dict[str, Series]) -> dict[str, Series]:
    """The two numbers that a person wants first: accuracies, then losses."""
    order = sorted(scalars, key=lambda n: (not n.startswith("acc"), not n.startswith("loss"), n))
    return {name: scalars[name] for name in order[:2]}
