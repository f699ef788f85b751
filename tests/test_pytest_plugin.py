"""The pytest plugin, in sessions of its own."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch._dynamo  # noqa: F401 - a session inside forgets what it imports itself, and torch

import learnables.auditing.example  # noqa: F401 - cannot be imported twice

pytest_plugins = ["pytester"]

MODEL = """
import pytest, torch
from torch import nn

def parts(forget=()):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    held = [p for n, p in model.named_parameters() if n not in forget]
    optimizer = torch.optim.SGD(held, lr=0.1)
    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    return model, optimizer, step
"""


def run(pytester: pytest.Pytester, tests: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(MODEL + tests)
    plugin = ["-p", "pytest_learnables"] if not _is_installed(pytester) else []
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *plugin, *options)


def _is_installed(pytester: pytest.Pytester) -> bool:
    from importlib.metadata import entry_points

    return any(e.value == "pytest_learnables" for e in entry_points(group="pytest11"))


def test_findings_fail_the_test_and_are_shown_without_a_traceback(
    pytester: pytest.Pytester,
) -> None:
    result = run(
        pytester,
        """
def test_clean(learnables_audit):
    assert learnables_audit(*parts()).iterations == 4

def test_forgotten(learnables_audit):
    learnables_audit(*parts(forget=["bias"]))

def test_looked_at(learnables_audit):
    assert learnables_audit(*parts(forget=["bias"]), fail=False).codes == ["LRN201"]

@pytest.mark.learnables(ignore="LRN2", steps=2)
def test_meant(learnables_audit):
    assert learnables_audit(*parts(forget=["bias"])).iterations == 2
""",
        "--strict-markers",
    )
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(
        ["error LRN201 trainable parameter is in no optimizer group", "*where: bias"]
    )
    result.stdout.fnmatch_lines(["learnables: 4 audits, 2 of them with findings"])
    result.stdout.no_fnmatch_line("*pytest_learnables.py*")


def test_the_marker_observes_the_loop_of_the_test(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
pytestmark = pytest.mark.learnables(observe=True, steps=3)

def train(forget=()):
    model, optimizer, step = parts(forget)
    for _ in range(5):
        step()

def test_clean():
    train()

def test_forgotten():
    train(["weight"])

def test_idle():
    parts()

def test_broken():
    train()
    assert 0, "its own failure"

@pytest.mark.learnables(select=["LRN3"])
def test_chosen():
    train(["weight"])
""",
    )
    result.assert_outcomes(passed=2, failed=3)
    result.stdout.fnmatch_lines(
        ["*LRN201*", "*where: weight*", "*no optimizer stepped in this test*", "*its own failure*"]
    )


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_one_report_for_the_session(pytester: pytest.Pytester, workers: list[str]) -> None:
    tests = """
@pytest.mark.parametrize("name", ["bias", "weight"])
def test_forgotten(learnables_audit, name):
    learnables_audit(*parts(forget=[name]), fail=False)
"""
    run(pytester, tests, "--learnables-report", "out/report.sarif", *workers)
    log = json.loads((pytester.path / "out" / "report.sarif").read_text())
    found = [r["properties"]["where"] for r in log["runs"][0]["results"] if r["level"] == "error"]
    assert sorted(found) == [["bias"], ["weight"]]
    if not workers:
        run(pytester, tests, "--learnables-report=report.xml", "--learnables-ignore", "LRN201")
        (suite,) = ET.parse(pytester.path / "report.xml").getroot()
        assert suite.get("failures") == "0"


def test_settings_and_baseline_of_the_project_count(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml('[tool.learnables]\nbaseline = "known.json"\nsteps = 2\n')
    known = {"version": 1, "findings": {"LRN201": ["bias"]}}
    (pytester.path / "known.json").write_text(json.dumps(known))
    result = run(
        pytester,
        """
def test_known(learnables_audit):
    assert learnables_audit(*parts(forget=["bias"])).iterations == 2

def test_new(learnables_audit):
    learnables_audit(*parts(forget=["weight"]))
""",
    )
    result.assert_outcomes(passed=1, failed=1)


def test_loading_it_imports_neither_torch_nor_learnables(tmp_path: Path) -> None:
    (tmp_path / "test_light.py").write_text(
        "import sys\n"
        "def test_light():\n"
        "    heavy = {'torch', 'learnables', 'numpy', 'rich'} & set(sys.modules)\n"
        "    assert not heavy\n"
    )
    words = [
        "-p",
        "no:learnables",
        "-p",
        "pytest_learnables",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *words, "test_light.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
