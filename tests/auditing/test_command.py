"""`learnables audit`, `rules` and `explain` as a shell sees them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from learnables.auditing.command import explain, print_rules, run_audit
from learnables.auditing.factory import UsersError, build, import_factory
from learnables.auditing.rule import load_rules
from learnables.errors import LearnablesError

NET = """\
import torch
from torch import nn
import learnables as ln

def make(skip=("bias",)):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    kept = [p for n, p in model.named_parameters() if n not in skip]
    optimizer = torch.optim.SGD(kept, lr=0.1)
    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    return model, optimizer, step

def clean():
    return make(skip=())

def keywords():
    model, optimizer, step = clean()
    return dict(model=model, optimizer=optimizer, step=step, intent=ln.Intent(trainable=["bias"]))

def many():
    model, optimizer, step = clean()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return model, [optimizer, torch.optim.Adam(nn.Linear(1, 1).parameters())], step, scheduler

def exhausted():
    model, optimizer, _ = clean()
    batches = iter([torch.randn(8, 4)])
    def step():
        optimizer.zero_grad()
        loss = model(next(batches)).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    return model, optimizer, step

def raises():
    return helper()

def helper():
    raise ValueError("not today")

def nothing():
    return 3

def unknown():
    return {"model": nn.Linear(1, 1), "setp": None}

class Made:
    build = staticmethod(clean)

ready = nn.Linear(2, 2)
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "users_net.py").write_text(NET)
    (tmp_path / "broken_net.py").write_text("import torch\nimport no_such_package_of_anyone\n")
    (tmp_path / "untidy_net.py").write_text("def make(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for name in ("users_net", "broken_net", "untidy_net"):
        sys.modules.pop(name, None)


def test_exit_codes_are_0_clean_1_findings_2_could_not_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_audit("users_net:clean") == 0
    assert run_audit("users_net:make") == 1
    assert "LRN201" in capsys.readouterr().out
    assert run_audit("users_net:exhausted") == 2
    assert "StopIteration" in capsys.readouterr().out
    assert run_audit("users_net:make", ignore=["LRN2,LRN3"]) == 0
    assert run_audit("users_net:make", select=["no-gradient"]) == 0


@pytest.mark.parametrize(
    "target", ["users_net:clean", "users_net.py:clean", "users_net:ready", "users_net:many"]
)
def test_factories_of_every_form_are_built(folder: Path, target: str) -> None:
    assert build(target)["model"] is not None
    if target.endswith("clean"):
        assert set(build(target)) == {"model", "optimizers", "step"}
    if target.endswith("many"):
        assert set(build(target)) == {"model", "optimizers", "step", "scheduler"}
        assert len(build(target)["optimizers"]) == 2


def test_a_factory_may_return_arguments_of_audit_and_be_an_attribute(folder: Path) -> None:
    assert set(build("users_net:keywords")) == {"model", "optimizer", "step", "intent"}
    assert run_audit("users_net:keywords") == 0
    assert set(build("users_net:Made.build")) == {"model", "optimizers", "step"}


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("broken_net:make", "ModuleNotFoundError: No module named 'no_such_package_of_anyone'"),
        ("no_such_net:make", "ModuleNotFoundError: No module named 'no_such_net'"),
        ("untidy_net:make", "SyntaxError: invalid syntax"),
        ("users_net:raises", "ValueError: not today"),
    ],
)
def test_an_error_of_the_users_is_shown_and_none_of_our_lines(
    folder: Path, target: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_audit(target) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(f"{line}\n")
    assert "learnables" not in err.replace("no_such", "")
    assert "importlib" not in err
    if target.startswith("users_net"):
        assert 'users_net.py", line' in err
        assert "in helper" in err


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("users_net", "names no factory"),
        ("users_net:mak", "is 'make' meant"),
        ("users_net:number", "builtins.int"),
        ("users_net:nothing", "builtins.int"),
        ("users_net:unknown", "setp"),
        ("no_such_file.py:make", "no such file"),
    ],
)
def test_what_is_no_factory_is_told_in_five_parts(folder: Path, target: str, told: str) -> None:
    with pytest.raises(LearnablesError, match=told):
        run_audit(target)


def test_a_baseline_is_written_read_and_told_what_it_no_longer_needs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = folder / "known.json"
    assert run_audit("users_net:make", new_baseline=known) == 0
    assert json.loads(known.read_text())["findings"] == {"LRN201": ["bias"]}
    (folder / "pyproject.toml").write_text('[tool.learnables]\nbaseline = "known.json"\n')
    assert run_audit("users_net:make") == 0
    assert "silenced: 1 finding (in the baseline" in capsys.readouterr().out
    assert run_audit("users_net:clean", baseline=known) == 0
    assert "LRN201 bias" in capsys.readouterr().err
    assert run_audit("users_net:clean", baseline=known, select=["LRN3"]) == 0
    assert "LRN201 bias" not in capsys.readouterr().err


def test_settings_count_unless_the_command_line_says_otherwise(folder: Path) -> None:
    (folder / "pyproject.toml").write_text('[tool.learnables]\nignore = ["LRN201"]\n')
    assert run_audit("users_net:make") == 0
    (folder / "pyproject.toml").write_text('[tool.learnables]\nselect = ["LRN3"]\n')
    assert run_audit("users_net:make") == 0
    assert run_audit("users_net:make", select=["missing-from-optimizer"]) == 1


def test_unknown_rules_and_formats_are_refused_before_anything_runs(folder: Path) -> None:
    with pytest.raises(LearnablesError, match="is no-gradient meant"):
        run_audit("users_net:raises", select=["no-gradiend"])
    with pytest.raises(LearnablesError, match="no such format"):
        run_audit("users_net:raises", format="yaml")


def test_experiments_are_asked_for_by_name_one_or_several(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_audit("users_net:clean", probes=["gradient,checkpoint"]) == 0
    assert run_audit("users_net:clean", probes=["gradient", "checkpoint"]) == 0
    with pytest.raises(LearnablesError, match=r"there is no such probe[\s\S]*'gradent'"):
        run_audit("users_net:raises", probes=["gradent"])


def test_rules_and_explain_know_codes_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_rules() == 0
    listed = capsys.readouterr().out
    assert all(code in listed for code in load_rules())
    assert max(map(len, listed.splitlines())) <= 80
    assert explain("no-gradient") == 0
    by_name = capsys.readouterr().out
    assert explain("LRN301") == 0
    assert by_name == capsys.readouterr().out == load_rules()["LRN301"].page + "\n"
    with pytest.raises(LearnablesError, match="is no-gradient meant"):
        explain("no-gradiend")


def test_from_a_shell(folder: Path) -> None:
    command = [sys.executable, "-m", "learnables", "audit", "users_net.py:make"]
    done = subprocess.run(
        [*command, "--format", "sarif", "--output", "out/report.sarif"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    (run,) = json.loads((folder / "out" / "report.sarif").read_text())["runs"]
    assert [r["ruleId"] for r in run["results"]] == ["LRN201"]
    done = subprocess.run(
        [*command, "--select", "nope"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no such rule")


def test_importing_is_told_apart_from_calling(folder: Path) -> None:
    assert callable(import_factory("users_net:raises"))
    with pytest.raises(UsersError, match="not today"):
        build("users_net:raises")
