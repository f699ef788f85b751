"""The pytest plugin: a fixture that audits a model, a marker that observes a test, a report file.

pytest loads this file at every start, so it imports nothing of torch or learnables outside the
hooks that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from learnables.auditing.report import Report
    from learnables.auditing.settings import Settings

_MARKER = (
    "learnables(observe=False, select=None, ignore=None, steps=None): how `learnables_audit` "
    "judges in this test; with observe=True the training loop of the test itself is audited."
)
_FORMATS = {".sarif": "sarif", ".json": "json", ".jsonl": "jsonl", ".xml": "junit"}
_records = pytest.StashKey[list[dict[str, Any]]]()
_settings = pytest.StashKey["Settings"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the command line."""
    group = parser.getgroup("learnables", "audits of models")
    group.addoption(
        "--learnables-report",
        metavar="FILE",
        help="write the findings of all audits: .sarif, .json, .jsonl, .xml (JUnit) or text",
    )
    group.addoption(
        "--learnables-select", metavar="RULES", help="only these rules: LRN2,no-gradient"
    )
    group.addoption("--learnables-ignore", metavar="RULES", help="no rules with these")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", _MARKER)
    config.stash[_records] = []


@pytest.fixture
def learnables_audit(request: pytest.FixtureRequest) -> Callable[..., Report]:
    """A function like `ln.audit` that fails the test on findings of severity error or warning.

    It takes what `ln.audit` takes, and ``fail=False`` to return the report whatever it says. Rules
    are chosen by its arguments, else by the marker, the command line, ``[tool.learnables]``.

    Example:
        def test_every_parameter_trains(learnables_audit):
            learnables_audit(model, optimizer, step)
    """

    def audit(*args: Any, fail: bool = True, **keywords: Any) -> Report:
        import learnables

        report = learnables.audit(*args, **{**_choice(request.node), **keywords})
        return _judged(request.node, report, fail=fail)

    return audit


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Observe the test itself where its marker says so."""
    if not any(mark.kwargs.get("observe") for mark in pyfuncitem.iter_markers("learnables")):
        return (yield)
    import learnables

    with learnables.observe(**_choice(pyfuncitem)) as seen:
        result = yield
    if seen.report is None or seen.report.iterations == 0:
        pytest.fail("learnables: no optimizer stepped in this test", pytrace=False)
    _judged(pyfuncitem, seen.report, fail=True)
    return result


def _choice(item: pytest.Item) -> dict[str, Any]:
    """Keywords for the audit: marker over command line over settings."""
    settings = _settings_of(item.config)
    chosen: dict[str, Any] = {
        "select": settings.select,
        "ignore": settings.ignore,
        "steps": settings.steps,
    }
    for name in ("select", "ignore"):
        said = item.config.getoption(f"--learnables-{name}")
        if said:
            chosen[name] = tuple(part.strip() for part in said.split(",") if part.strip())
    for mark in reversed(list(item.iter_markers("learnables"))):
        unknown = set(mark.kwargs) - {"observe", "select", "ignore", "steps"}
        if mark.args or unknown:
            pytest.fail(f"the marker learnables has no {unknown or mark.args}", pytrace=False)
        said = {k: v for k, v in mark.kwargs.items() if k != "observe" and v is not None}
        chosen |= {k: (v,) if isinstance(v, str) else v for k, v in said.items()}
    return chosen


def _settings_of(config: pytest.Config) -> Settings:
    if _settings not in config.stash:
        from learnables.auditing.settings import read_settings

        config.stash[_settings] = read_settings(config.rootpath)
        config.stash[_settings].put_into_force()
    return config.stash[_settings]


def _judged(item: pytest.Item, report: Report, *, fail: bool) -> Report:
    """The report without what the baseline knows; fails the test on findings."""
    baseline = _settings_of(item.config).baseline
    if baseline is not None:
        from learnables.auditing.baseline import read_baseline, without_known

        report = without_known(report, read_baseline(baseline), str(baseline))
    item.config.stash[_records].append({"test": item.nodeid, **report.to_dict()})
    if fail and report.crashed is not None:
        raise report.crashed
    if fail and not report.ok:
        pytest.fail(str(report), pytrace=False)
    return report


# -- one report for the session -------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist has found."""
    node.config.stash[_records] += getattr(node, "workeroutput", {}).get("learnables", [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the findings to the controller, or write the report file."""
    records = session.config.stash[_records]
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["learnables"] = records
        return
    file = session.config.getoption("--learnables-report")
    if file is None:
        return
    from learnables.auditing.report import Report
    from learnables.auditing.rule import Finding
    from learnables.auditing.writers import emit

    findings = [
        Finding(**{key: value for key, value in said.items() if key != "quote"})
        for record in records
        for said in record["findings"]
    ]
    once = {repr(finding): finding for finding in findings}
    whole = Report(list(once.values()), iterations=sum(record["iterations"] for record in records))
    emit(
        whole, _FORMATS.get(Path(file).suffix, "text"), session.config.invocation_params.dir / file
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line, where there were audits."""
    records = config.stash[_records]
    if records:
        wrong = sum(not record["ok"] for record in records)
        terminalreporter.write_line(
            f"learnables: {len(records)} audits, {wrong} of them with findings"
        )
