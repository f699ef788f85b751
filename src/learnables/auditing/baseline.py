"""Findings that are known: an old code base starts clean, and only what is new is reported.

The file holds one line per rule and parameter, sorted, so that two branches merge and a diff reads
like a list. A parameter is known by its plain name: wrappers and line numbers do not matter.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from learnables._torch import without_wrappers
from learnables.auditing.report import Report
from learnables.auditing.rule import Finding
from learnables.errors import LearnablesError
from learnables.runtime.atomic import replace_file

VERSION = 1


def write_baseline(report: Report, file: Path) -> int:
    """Write what ``report`` found, replacing the file; returns how many lines that are."""
    known: dict[str, set[str]] = {}
    for finding in report.findings:
        known.setdefault(finding.code, set()).update(_keys(finding))
    found = {code: sorted(names) for code, names in sorted(known.items())}
    text = json.dumps({"version": VERSION, "findings": found}, indent=1) + "\n"

    def fill(draft: Path) -> None:
        draft.write_text(text, "utf-8")

    replace_file(file, fill)
    return sum(map(len, found.values()))


def read_baseline(file: Path) -> Mapping[str, frozenset[str]]:
    """Rule code → names of the parameters whose findings are known.

    Raises:
        LearnablesError: There is no such file, or it is no baseline.
    """
    try:
        said = json.loads(file.read_text("utf-8"))
        known = {str(code): frozenset(names) for code, names in said["findings"].items()}
    except FileNotFoundError:
        raise LearnablesError(
            "there is no such baseline",
            where=str(file),
            mend=f"learnables audit … --write-baseline {file}",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LearnablesError(
            "the baseline cannot be read",
            where=str(file),
            found=repr(error),
            wanted='{"version": 1, "findings": {…}}',
        ) from None
    if said.get("version") != VERSION:
        raise LearnablesError(
            "the baseline is of another version",
            where=str(file),
            found=f"version {said.get('version')!r}",
            wanted=f"version {VERSION}",
        )
    return known


def without_known(report: Report, known: Mapping[str, frozenset[str]], name: str) -> Report:
    """The report with known findings among the silenced, parameter by parameter.

    Args:
        report: The report.
        known: What `read_baseline` returned.
        name: How the reason calls the baseline.
    """
    left: list[Finding] = []
    silenced = list(report.silenced)
    why = f"in the baseline {name}"
    for finding in report.findings:
        names = known.get(finding.code, frozenset())
        old = [n for n, key in zip(finding.where, _keys(finding), strict=False) if key in names]
        if names.issuperset(_keys(finding)):
            silenced.append((finding, why))
        elif not old:
            left.append(finding)
        else:
            new = [n for n in finding.where if n not in old]
            left.append(replace(finding, where=new, mend=_mend_without(finding, old)))
            silenced.append((replace(finding, where=old), why))
    return Report(
        left,
        skipped=report.skipped,
        parameters=report.parameters,
        not_restored=report.not_restored,
        silenced=silenced,
        iterations=report.iterations,
        crashed=report.crashed,
    )


def gone(report: Report, known: Mapping[str, frozenset[str]], judged: Collection[str]) -> list[str]:
    """Lines of the baseline that nothing needs any more, as ``CODE name``.

    Args:
        report: The report, before `without_known`.
        known: What `read_baseline` returned.
        judged: Codes of the rules that were asked; what others found stays.
    """
    found: dict[str, set[str]] = {}
    for finding in (*report.findings, *(f for f, _ in report.silenced)):
        found.setdefault(finding.code, set()).update(_keys(finding))
    return [
        f"{code} {name}"
        for code, names in known.items()
        if code in judged and code not in report.skipped
        for name in sorted(names - found.get(code, set()))
    ]


def _keys(finding: Finding) -> list[str]:
    return [without_wrappers(name) for name in finding.where] or [finding.what]


def _mend_without(finding: Finding, old: Sequence[str]) -> str:
    """The lines to type that do not name a parameter whose finding is known."""
    lines = finding.mend.split("\n")
    return "\n".join(line for line in lines if not any(repr(name) in line for name in old))
