"""Every format says the same, is read back whole, and cannot be broken by a name."""

import io
import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from learnables.auditing import writers
from learnables.auditing.places import shown
from learnables.auditing.report import Report
from learnables.auditing.rule import Finding
from learnables.errors import LearnablesError

SCHEMA = json.loads(
    (Path(__file__).parents[1] / "goldens" / "sarif-2.1.0.schema.json").read_text("utf-8")
)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
MODEL = """\
class Net(nn.Module):
    def forward(self, x):
        return self.head(x * self.scale.data)
"""
EVIL = [
    "</script><img src=x onerror=alert(1)>",
    "a\n::error file=x::y",
    "\x1b[31mred\x1b[0m",
    "]]><!-- &amp; \"'",
    "[here](https://example.org) {0}",
    "\u202egnp.exe",
    "\ud800 alone",
    "\ufffe\x00\x0b",
    "=cmd|' /C calc'!A0",
    "%0A::stop-commands::x",
]
names = st.one_of(st.sampled_from(EVIL), st.text(st.characters(), min_size=1, max_size=40))


def a_report(name: str = "scale", location: str | None = None) -> Report:
    cut = Finding(
        code="LRN301",
        name="no-gradient",
        severity="error",
        what="no gradient arrives at a trainable parameter",
        where=[name],
        found="gradient None in 4 of 4 observed iterations; .data makes a copy without graph",
        wanted="a gradient in at least one of them",
        location=location,
    )
    left_out = Finding(
        code="LRN201",
        name="missing-from-optimizer",
        severity="error",
        what="trainable parameter is in no optimizer group",
        where=[name, *(f"blocks.{i}.attention.scale" for i in range(14))],
        found=f"shape (4,), float32, cpu; in 0 of 2 groups {name}",
        wanted="exactly one group",
        mend=f"optimizer.add_param_group({{'params': [model.get_parameter({name!r})]}})",
    )
    rare = Finding(
        code="LRN302",
        name="zero-gradient",
        severity="warning",
        what="gradient is exactly zero",
        where=["gate"],
        found="‖gradient‖ = 0 in 4 of 4 observed iterations",
        wanted="> 0 in at least one",
    )
    note = Finding(code="LRN401", name="value-never-moves", severity="note", what="rests", where=[])
    return Report(
        [cut, left_out, rare, note],
        skipped={"LRN202": f"no group to look at {name}"},
        not_restored=[f"{name}: a generator that was advanced"],
        silenced=[(cut, f"meant, see {name}"), (rare, "in the baseline")],
        iterations=4,
        crashed=ValueError(f"no batch called {name}"),
    )


@pytest.fixture
def model_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL, "utf-8")
    return str(tmp_path / "model.py")


@pytest.mark.parametrize("format", ["text", "jsonl", "github", "junit", "notebook"])
def test_looks_as_it_should(format: str, model_file: str, golden: Any) -> None:
    report = a_report(location=f"{model_file}:3")
    written = writers.notebook(report) if format == "notebook" else writers.write(report, format)
    if format == "junit":  # one test case for every rule there will ever be
        written = re.sub(r"(?m)^  <testcase [^>]*/>\n|(?<=tests=)\"\d+\"", "", written)
    golden(f"report.{format}", written.replace(str(Path(model_file).parent), "FOLDER"))


def test_sarif_looks_as_it_should(model_file: str, golden: Any) -> None:
    (run,) = json.loads(a_report(location=f"{model_file}:3").to_sarif())["runs"]
    for result in run["results"]:
        result.pop("ruleIndex")
    golden("report.sarif", json.dumps(run["results"], indent=2, ensure_ascii=False) + "\n")


@settings(max_examples=60)
@given(name=names, at=st.sampled_from([None, "/srv/x y/[1]{2}.py:3", "<ipython-input-3>:2"]))
@example(name="plain", at=None)
def test_sarif_is_valid_whatever_the_names(name: str, at: str | None) -> None:
    written = a_report(name, at).to_sarif()
    log = json.loads(written)
    VALIDATOR.validate(log)
    written.encode("utf-8")
    (run,) = log["runs"]
    for result in run["results"]:
        said = result["message"]["text"]
        assert not re.search(r"(?<!\\)(\\\\)*[\[\]]", said), "a bracket would be a link"
        assert not re.search(r"\{\d", said.replace("{{", "")), "a brace would be a placeholder"
        if "ruleIndex" in result:
            assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]


@settings(max_examples=80)
@given(name=names)
def test_text_shows_only_what_is_seen_and_keeps_to_80_columns(name: str) -> None:
    for line in writers.text(a_report(name)).splitlines():
        assert line.isprintable()
        longest_word = max(map(len, line.split(" ")), default=0)
        assert len(line) <= 80 or longest_word > 40 or "mend:" in line
    for line in str(a_report(name).findings[0]).splitlines():
        assert line.isprintable()


@settings(max_examples=80)
@given(name=names)
def test_github_has_one_command_a_finding(name: str) -> None:
    lines = writers.github(a_report(name)).split("\n")
    assert len(lines) == 5
    for line in lines[:-1]:
        assert re.match(r"::(error|warning|notice) [^:]*title=[A-Z0-9]+ [a-z-]*::", line)
        assert line.isprintable()


@settings(max_examples=80)
@given(name=names)
def test_junit_is_read_back_and_a_name_adds_no_element(name: str) -> None:
    def shape(report: Report) -> list[str]:
        return [e.tag for e in ET.fromstring(writers.junit(report)).iter()]

    assert shape(a_report(name)) == shape(a_report("plain"))


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen[(tag, tuple(attrs))] += 1

    def handle_comment(self, data: str) -> None:
        self.seen["comment"] += 1


@settings(max_examples=80)
@given(name=names)
def test_a_name_adds_nothing_to_the_html(name: str) -> None:
    assert Tags(writers.notebook(a_report(name))).seen == Tags(writers.notebook(a_report())).seen


@settings(max_examples=80)
@given(name=names)
def test_json_gives_back_what_went_in(name: str) -> None:
    report = a_report(name)
    assert json.loads(writers.json(report))["findings"] == report.to_dict()["findings"]
    lines = writers.jsonl(report).splitlines()
    assert [json.loads(line)["where"] for line in lines] == [f.where for f in report.findings]


def test_a_clean_report_is_quiet() -> None:
    clean = Report([], iterations=4)
    assert writers.text(clean) == "clean; 0 parameters, 4 observed iterations\n"
    assert writers.jsonl(clean) == writers.github(clean) == ""
    (suite,) = ET.fromstring(writers.junit(clean))
    assert suite.get("failures") == suite.get("errors") == "0"


def test_a_file_is_written_as_a_whole_and_a_stream_in_its_own_encoding(tmp_path: Path) -> None:
    report, file = a_report("\ud800 ‖x‖"), tmp_path / "deep" / "report.txt"
    writers.emit(report, output=file)
    assert file.read_text("utf-8") == writers.text(report)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    writers.emit(report, "text", Path("-"), stream)
    stream.seek(0)
    assert "\\u2016gradient" in stream.read()
    with pytest.raises(LearnablesError, match="no such format"):
        writers.emit(report, "yaml")


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file is no folder")
    with pytest.raises(LearnablesError, match="the report cannot be written") as error:
        writers.put("text", tmp_path / "file" / "report.txt")
    assert error.value.where.endswith("report.txt")


def test_colours_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    on_terminal, in_pipe = Terminal(), io.StringIO()
    for stream in (on_terminal, in_pipe):
        writers.emit(a_report(), stream=stream)
    assert "\x1b[" in on_terminal.getvalue()
    plain = re.sub(r"\x1b\[[\d;]*m", "", on_terminal.getvalue())
    assert plain == in_pipe.getvalue() == writers.text(a_report())


def test_a_cell_of_a_notebook_is_called_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(file: str) -> tuple[str, str] | None:
        return ("Cell", "In[7]") if file.endswith("/123.py") else None

    shell = SimpleNamespace(compile=SimpleNamespace(format_code_name=named))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert shown("/tmp/ipykernel_9/123.py:4") == "In[7]:4"
    assert shown("/srv/model.py:4") == "/srv/model.py:4"
    assert writers.github(a_report(location="/tmp/ipykernel_9/123.py:4")).count("file=") == 0
