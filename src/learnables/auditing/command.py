"""What ``learnables audit``, ``rules`` and ``explain`` do. Each function returns an exit code.

0: clean. 1: findings of severity error or warning. 2: could not run.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from learnables.auditing.baseline import gone, read_baseline, without_known, write_baseline
from learnables.auditing.experiments import check_probes
from learnables.auditing.factory import UsersError, build
from learnables.auditing.report import Report
from learnables.auditing.rule import load_rules, patterns_in, picks, rules_named
from learnables.auditing.run import audit
from learnables.auditing.settings import Settings, read_settings
from learnables.auditing.writers import check_format, emit


def checked(settings: Settings, select: Iterable[str], ignore: Iterable[str]) -> Settings:
    """The settings with what the command line says instead of them.

    Raises:
        LearnablesError: A code or a name means no rule.
    """
    from dataclasses import replace

    chosen = patterns_in(select)
    left_out = patterns_in(ignore)
    result = replace(
        settings,
        select=chosen or settings.select,
        ignore=(*settings.ignore, *left_out),
    )
    patterns_in((*(result.select or ()), *result.ignore))
    return result


def run_audit(
    target: str,
    *,
    steps: int | None = None,
    format: str = "text",
    output: Path | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    baseline: Path | None = None,
    new_baseline: Path | None = None,
    probes: Iterable[str] = (),
) -> int:
    """Audit what a factory builds; print the report; the exit code."""
    check_format(format)
    probes = [name for said in probes for name in said.replace(",", " ").split()]
    check_probes(probes)
    settings = checked(read_settings(), select, ignore)
    baseline = baseline or (settings.baseline if new_baseline is None else None)
    known = read_baseline(baseline) if baseline is not None else None
    settings.put_into_force()
    try:
        arguments = build(target)
    except UsersError as error:
        print(error.told, end="", file=sys.stderr)
        return 2
    report = audit(
        **arguments,
        select=settings.select,
        ignore=settings.ignore,
        steps=steps or settings.steps,
        probes=probes,
    )
    if new_baseline is not None:
        count = write_baseline(report, new_baseline)
        print(f"{count} known findings in {new_baseline}", file=sys.stderr)
        return 0 if report.crashed is None else 2
    if known is not None:
        judged = _judged(settings)
        for line in gone(report, known, judged):
            print(f"no longer found, take it out of {baseline}: {line}", file=sys.stderr)
        report = without_known(report, known, str(baseline))
    emit(report, format, output)
    return exit_code(report)


def _judged(settings: Settings) -> set[str]:
    return {
        rule.code
        for rule in load_rules().values()
        if (settings.select is None or picks(rule, settings.select))
        and not picks(rule, settings.ignore)
    }


def exit_code(report: Report) -> int:
    """2 where the step raised, 1 where something was found, 0 where it is clean."""
    if report.crashed is not None:
        return 2
    return 0 if report.ok else 1


def print_rules(select: Iterable[str] = ()) -> int:
    """Print every rule in a table; the exit code."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    patterns = patterns_in(select)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("code", "name", "severity", "finds"):
        table.add_column(column, overflow="fold", no_wrap=column == "code")
    for rule in load_rules().values():
        if not patterns or picks(rule, patterns):
            table.add_row(rule.code, rule.name, rule.severity, rule.title)
    Console().print(table)
    return 0


def explain(pattern: str) -> int:
    """Print the page of each rule that a code or a name means; the exit code."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    for rule in rules_named(pattern):
        if console.is_terminal:
            console.print(Markdown(rule.page))
        else:
            print(rule.page)
    return 0
