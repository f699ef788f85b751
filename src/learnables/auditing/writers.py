"""Write a report: for people (text, HTML) and for programs (JSON, SARIF, GitHub, JUnit).

Names of parameters are hostile input. Every writer passes whatever came from the model through the
escape of its format; the property test in ``tests/auditing/test_writers.py`` holds them to it.
"""

import hashlib
import json as _json
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TextIO
from urllib.parse import quote as _percent

from learnables.auditing.places import shown
from learnables.auditing.rule import FAMILIES, SEVERITIES, Finding, Rule, load_rules
from learnables.errors import LearnablesError
from learnables.runtime.atomic import replace_file
from learnables.watching.sinks.escape import github as _github
from learnables.watching.sinks.escape import html as _html
from learnables.watching.sinks.escape import visible

WIDTH = 80
MOST_NAMES = 12


class Written(Protocol):
    """What a writer reads of a report."""

    findings: list[Finding]
    skipped: dict[str, str]
    silenced: list[tuple[Finding, str]]
    parameters: Any
    not_restored: list[str]
    iterations: int
    crashed: BaseException | None

    @property
    def ok(self) -> bool:
        """No finding of severity error or warning."""

    @property
    def summary(self) -> str:
        """One line of counts."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""


# -- text -----------------------------------------------------------------------------------------

_Part = tuple[str, str]
"""A style of rich and a piece of text."""

_COLOURS = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}


def text(report: Written) -> str:
    """Findings in the five-part form, 80 columns wide, then one line of counts.

    Only words without a space and the line to type (``mend``) may be longer than 80 columns.
    """
    return "".join(piece for _, piece in _pieces(report))


def _pieces(report: Written) -> Iterator[_Part]:
    for finding in report.findings:
        yield from _finding(finding)
        yield "", "\n"
    for words in report.not_restored:
        yield "", _wrapped("not restored: ", visible(words)) + "\n"
    for reason, count in _reasons(report).items():
        said = f"{count} finding{'s' * (count != 1)} ({visible(reason)})"
        yield "dim", _wrapped("silenced: ", said) + "\n"
    if report.crashed is not None:
        yield "bold red", _wrapped("stopped: ", f"the step raised {_raised(report)}") + "\n"
    yield "bold green" if report.ok else "bold", _wrapped("", report.summary) + "\n"
    if report.findings:
        yield "dim", f"more: learnables explain {report.findings[0].code}\n"


def _finding(finding: Finding) -> Iterator[_Part]:
    severity = finding.severity or "note"
    yield _COLOURS[severity], severity
    yield "bold", f" {finding.code}"
    head = f"{severity} {finding.code} "
    yield "", _wrapped(head, visible(finding.what), hang=4)[len(head) - 1 :] + "\n"
    for key, value in _parts(finding):
        yield "dim", f"  {key}:"
        yield "magenta" if key == "at" else "", f"{value}\n"


def _parts(finding: Finding) -> Iterator[tuple[str, str]]:
    """Key and value of every line below the first; values begin with their blank."""
    if finding.where:
        names = [visible(name) for name in finding.where[:MOST_NAMES]]
        more = len(finding.where) - len(names)
        yield "where", _value("where", ", ".join(names) + (f" and {more} more" if more else ""))
    if finding.location:
        at, code = visible(shown(finding.location)), visible(finding.quote)
        apart = f"\n      {code}" if len(at) + len(code) + 8 > WIDTH else f"  {code}"
        yield "at", f" {at}{apart if code else ''}"
    for key in ("found", "wanted"):
        if getattr(finding, key):
            yield key, _value(key, visible(getattr(finding, key)))
    if finding.mend:
        yield "mend", " " + "\n        ".join(map(visible, _mends(finding)))


def _mends(finding: Finding) -> list[str]:
    lines = [line for line in finding.mend.split("\n") if line]
    more = len(lines) - MOST_NAMES
    return lines if more <= 0 else [*lines[:MOST_NAMES], f"# and {more} more"]


def _value(key: str, words: str) -> str:
    head = f"  {key}:"
    return _wrapped(f"{head} ", words)[len(head) :]


def _wrapped(head: str, words: str, hang: int | None = None) -> str:
    return textwrap.fill(
        words,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * (len(head) if hang is None else hang),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _reasons(report: Written) -> dict[str, int]:
    counts: dict[str, int] = {}
    for _, reason in report.silenced:
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def _raised(report: Written) -> str:
    error = report.crashed
    return visible(f"{type(error).__name__}: {error}") if str(error) else type(error).__name__


# -- JSON -----------------------------------------------------------------------------------------


def json(report: Written) -> str:
    """The whole report as one JSON object, ASCII only."""
    return _json.dumps({"version": 1, **report.to_dict()}, indent=2, allow_nan=False) + "\n"


def jsonl(report: Written) -> str:
    """One JSON object a line, one line a finding; nothing where there is none."""
    found = report.to_dict()["findings"]
    return "".join(_json.dumps(finding, allow_nan=False) + "\n" for finding in found)


# -- SARIF ----------------------------------------------------------------------------------------

_SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(report: Written) -> str:
    """SARIF 2.1.0, as code-scanning services read it.

    Silenced findings are results with a suppression; a rule that could not judge is a notification;
    parameters are logical locations.

    Source:
        OASIS, *Static Analysis Results Interchange Format (SARIF) Version 2.1.0*.
    """
    rules = load_rules()
    index = {code: i for i, code in enumerate(rules)}
    results = [_result(finding, index) for finding in report.findings]
    for finding, reason in report.silenced:
        meant = {"kind": "external", "status": "accepted", "justification": _whole(reason)}
        results.append({**_result(finding, index), "suppressions": [meant]})
    notifications = [
        {
            "level": "note",
            "message": {"text": _message(f"{code} could not judge: {reason}")},
            "associatedRule": {"id": code, "index": index[code]},
        }
        for code, reason in report.skipped.items()
        if code in index
    ]
    invocation: dict[str, Any] = {
        "executionSuccessful": report.crashed is None,
        "toolConfigurationNotifications": notifications,
    }
    if report.crashed is not None:
        raised = {"text": _message(f"the step raised {_raised(report)}")}
        invocation["toolExecutionNotifications"] = [{"level": "error", "message": raised}]
    driver = {
        "name": "learnables",
        "semanticVersion": import_module("learnables").__version__,
        "rules": [_described(rule) for rule in rules.values()],
    }
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "invocations": [invocation],
        "results": results,
        "properties": {"iterations": report.iterations, "parameters": len(report.parameters)},
    }
    log = {"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}
    return _json.dumps(log, indent=2, allow_nan=False) + "\n"


def _described(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.code,
        "name": "".join(part.capitalize() for part in rule.name.split("-")),
        "shortDescription": {"text": _message(rule.title)},
        "help": {"text": _message(rule.page), "markdown": rule.page},
        "defaultConfiguration": {"level": rule.severity},
        "properties": {"tags": [FAMILIES[rule.code[3]]]},
    }


def _result(finding: Finding, index: Mapping[str, int]) -> dict[str, Any]:
    said = [finding.what, *(f"{k}: {v}" for k, v in _compared(finding) if v)]
    result: dict[str, Any] = {
        "ruleId": finding.code,
        "level": finding.severity or "note",
        "message": {"text": _message("; ".join(said))},
        "partialFingerprints": {"learnables/v1": fingerprint(finding)},
        "properties": {"where": [_whole(name) for name in finding.where]},
    }
    if finding.code in index:
        result["ruleIndex"] = index[finding.code]
    if finding.mend:
        result["properties"]["mend"] = _whole(finding.mend)
    logical = [{"fullyQualifiedName": _whole(n), "kind": "member"} for n in finding.where]
    location: dict[str, Any] = {"logicalLocations": logical} if logical else {}
    physical = _physical(finding)
    if physical:
        location["physicalLocation"] = physical
    return {**result, "locations": [location]} if location else result


def _compared(finding: Finding) -> tuple[tuple[str, str], ...]:
    where = ", ".join(finding.where[:MOST_NAMES])
    return ("where", where), ("found", finding.found), ("wanted", finding.wanted)


def _physical(finding: Finding) -> dict[str, Any] | None:
    file, _, line = (finding.location or "").rpartition(":")
    if not line.isdigit() or not Path(file).is_absolute():  # a notebook cell has no address
        return None
    region: dict[str, Any] = {"startLine": max(1, int(line))}
    if finding.quote:
        region["snippet"] = {"text": _whole(finding.quote)}
    return {"artifactLocation": _address(Path(file)), "region": region}


def _address(file: Path) -> dict[str, str]:
    try:
        inside = file.relative_to(Path.cwd())
    except ValueError:
        return {"uri": file.as_uri()}
    return {"uri": _percent(inside.as_posix().encode("utf-8", "surrogateescape"))} | {
        "uriBaseId": "%SRCROOT%"
    }


def _message(words: str) -> str:
    """Text of a SARIF message, where braces are placeholders and brackets are links."""
    doubled = words.replace("{", "{{").replace("}", "}}")
    return _whole(doubled.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]"))


def _whole(words: str) -> str:
    """``words`` with unpaired surrogates spelt, which strict readers of JSON refuse."""
    return "".join(visible(c) if "\ud800" <= c <= "\udfff" else c for c in words)


def fingerprint(finding: Finding) -> str:
    """The same for the same finding of another day: rule, parameters and file, but no line."""
    file = shown(finding.location).rpartition(":")[0]
    said = _json.dumps([finding.code, sorted(finding.where), finding.what, file])
    return hashlib.sha256(said.encode()).hexdigest()[:32]


# -- GitHub, JUnit --------------------------------------------------------------------------------

_GITHUB = {"error": "error", "warning": "warning", "note": "notice"}


def github(report: Written) -> str:
    """Workflow commands, which GitHub shows beside the line they are about."""
    lines = []
    for finding in report.findings:
        file, _, line = shown(finding.location).rpartition(":")
        where = {"file": file, "line": line} if line.isdigit() and "[" not in file else {}
        where["title"] = f"{finding.code} {finding.name}"
        properties = ",".join(f"{k}={_github(v, attribute=True)}" for k, v in where.items())
        said = [finding.what, *(f"{k}: {v}" for k, v in _compared(finding) if v)]
        said += [f"mend: {line}" for line in _mends(finding)]
        kind = _GITHUB[finding.severity or "note"]
        lines.append(f"::{kind} {properties}::{_github(chr(10).join(said))}\n")
    return "".join(lines)


def junit(report: Written) -> str:
    """JUnit XML: one test case a rule; warnings and errors fail it, notes are its output."""
    by_code: dict[str, list[Finding]] = {}
    for finding in report.findings:
        by_code.setdefault(finding.code, []).append(finding)
    cases = [
        _case(rule, by_code.get(rule.code, []), report.skipped.get(rule.code))
        for rule in load_rules().values()
    ]
    if report.crashed is not None:
        said = _html(f"the step raised {_raised(report)}")
        cases.append(
            f'  <testcase classname="learnables" name="step"><error message="{said}"/></testcase>\n'
        )
    counts = {
        tag: sum(f"<{tag}" in case for case in cases) for tag in ("failure", "skipped", "error")
    }
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<testsuites><testsuite name="learnables" tests="{len(cases)}"'
        f' failures="{counts["failure"]}" errors="{counts["error"]}"'
        f' skipped="{counts["skipped"]}">\n' + "".join(cases) + "</testsuite></testsuites>\n"
    )


def _case(rule: Rule, findings: Sequence[Finding], skipped: str | None) -> str:
    inside = ""
    failing = [f for f in findings if f.severity != "note"]
    notes = [f for f in findings if f.severity == "note"]
    if failing:
        said = "\n\n".join(_block(f) for f in failing)
        inside += f'<failure message="{_html(failing[0].what)}">{said}</failure>'
    if skipped is not None:
        inside += f'<skipped message="{_html(skipped)}"/>'
    if notes:
        inside += f"<system-out>{chr(10).join(_block(f) for f in notes)}</system-out>"
    family = FAMILIES[rule.code[3]].replace(" ", "-")
    name = f'classname="learnables.{family}" name="{rule.code} {rule.name}"'
    return f"  <testcase {name}>{inside}</testcase>\n" if inside else f"  <testcase {name}/>\n"


def _block(finding: Finding) -> str:
    plain = "".join(piece for _, piece in _finding(finding))
    return "\n".join(_html(line) for line in plain.splitlines())


# -- notebook -------------------------------------------------------------------------------------

_INK = {"error": "#c62828", "warning": "#b26a00", "note": "#00838f"}
_COLUMNS = ("", "where", "at", "found", "wanted", "mend")


def notebook(report: Written) -> str:
    """A table for notebooks: no script, no style sheet, nothing fetched."""
    head = "".join(f"<th>{c}</th>" for c in _COLUMNS)
    rows = "".join(_row(finding) for finding in report.findings)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>" if rows else ""
    notes = "".join(f"<p>not restored: {_html(words)}</p>" for words in report.not_restored)
    notes += "".join(
        f"<p>silenced: {count} ({_html(reason)})</p>" for reason, count in _reasons(report).items()
    )
    if report.crashed is not None:
        notes += f"<p>the step raised {_html(_raised(report))}</p>"
    return f"<div><p><b>{_html(report.summary)}</b></p>{table}{notes}</div>"


def _row(finding: Finding) -> str:
    severity = finding.severity or "note"
    names = [f"<code>{_html(name)}</code>" for name in finding.where[:MOST_NAMES]]
    if len(finding.where) > MOST_NAMES:
        names.append(f"and {len(finding.where) - MOST_NAMES} more")
    at = _html(shown(finding.location))
    mend = "<br>".join(f"<code>{_html(line)}</code>" for line in _mends(finding))
    cells = [
        f'<b style="color:{_INK[severity]}">{severity}</b> {_html(finding.code)} '
        f"{_html(finding.what)}",
        "<br>".join(names),
        f"{at}<br><code>{_html(finding.quote)}</code>" if at else "",
        _html(finding.found),
        _html(finding.wanted),
        mend,
    ]
    ink = 'style="text-align:left;vertical-align:top"'
    return "<tr>" + "".join(f"<td {ink}>{cell}</td>" for cell in cells) + "</tr>"


# -- where to -------------------------------------------------------------------------------------

FORMATS: Mapping[str, Callable[[Written], str]] = {
    "text": text,
    "json": json,
    "jsonl": jsonl,
    "sarif": sarif,
    "github": github,
    "junit": junit,
}
assert set(_GITHUB) == set(_COLOURS) == set(_INK) == set(SEVERITIES)


def write(report: Written, format: str = "text") -> str:
    """The report in one of `FORMATS`.

    Raises:
        LearnablesError: There is no such format.
    """
    check_format(format)
    return FORMATS[format](report)


def check_format(format: str, known: Collection[str] = tuple(FORMATS)) -> None:
    """Refuse a format, best before anything is run.

    Raises:
        LearnablesError: There is no such format.
    """
    if format not in known:
        wanted = ", ".join(known)
        raise LearnablesError("there is no such format", found=repr(format), wanted=wanted)


def put(text: str, output: Path | None = None, stream: TextIO | None = None) -> None:
    """Write a text to a file, as a whole or not at all, or to a stream, in what it can encode.

    Args:
        text: The text.
        output: The file; None or ``-`` for the stream.
        stream: Where to, without a file; standard output when not given.

    Raises:
        LearnablesError: The file cannot be written.
    """
    if output is not None and str(output) != "-":
        data = text.encode("utf-8", "backslashreplace")
        try:
            replace_file(output, lambda draft: _fill(draft, data))
        except OSError as error:
            raise LearnablesError(
                "the report cannot be written",
                where=str(output),
                found=f"{type(error).__name__}: {error.strerror}",
                wanted="a file in a place that can be written to",
            ) from error
        return
    stream = sys.stdout if stream is None else stream
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def _fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def emit(
    report: Written,
    format: str = "text",
    output: Path | None = None,
    stream: TextIO | None = None,
) -> None:
    """Write the report to a file, as a whole or not at all, or to a stream.

    Text is coloured where the stream is a terminal that wants colours, and nowhere else.

    Args:
        report: The report.
        format: One of `FORMATS`.
        output: The file; None or ``-`` for the stream.
        stream: Where to, without a file; standard output when not given.

    Raises:
        LearnablesError: There is no such format, or the file cannot be written.
    """
    to_stream = output is None or str(output) == "-"
    stream = sys.stdout if stream is None else stream
    if to_stream and format == "text" and stream.isatty():
        from rich.console import Console
        from rich.text import Text

        console = Console(file=stream, highlight=False, soft_wrap=True)
        console.print(Text.assemble(*((piece, style) for style, piece in _pieces(report))), end="")
        stream.flush()
    else:
        put(write(report, format), output, stream)
