"""Run a program as it is and with one bug planted: what the tests of `learnables run` share."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OPTIONS = ("run", "--format", "json", "--output", "report.json")
Run = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Bug:
    """A change to a program, and what has to be said about it.

    Attributes:
        program: Name of the file.
        old: Text that is replaced; it occurs once.
        new: What replaces it.
        code: The rule that has to find it.
        where: Parameters that one of its findings has to name.
        line: Text of the line that the finding has to quote; None where no line is to blame.
    """

    program: str
    old: str
    new: str
    code: str
    where: tuple[str, ...]
    line: str | None = None


@contextmanager
def zygote(environment: Mapping[str, str], *modules: str) -> Iterator[Run]:
    """A function that runs a command line of `learnables` in a folder, `modules` imported."""
    words = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("zygote.py")), *modules]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment) as parent:
        assert parent.stdin is not None

        def run(*words: str, folder: Path) -> dict[str, Any]:
            assert parent.stdin is not None
            assert parent.stdout is not None
            parent.stdin.write(json.dumps({"words": words, "folder": str(folder)}) + "\n")
            parent.stdin.flush()
            return json.loads(parent.stdout.readline())

        yield run
        parent.stdin.close()


def plant(bug: Bug, programs: Path, folder: Path) -> Path:
    """The program with its bug, written to a folder."""
    text = (programs / bug.program).read_text("utf-8")
    assert text.count(bug.old) == 1, "the bug has one place"
    path = folder / bug.program
    path.write_text(text.replace(bug.old, bug.new), "utf-8")
    return path


def check_good_and_bad(bug: Bug, programs: Path, run: Run, folder: Path) -> None:
    """No alarm for the program as it is; its planted bug is named, and the training stopped."""
    good = run(*OPTIONS, str(programs / bug.program), folder=folder)
    assert good["code"] == 0, good["err"]
    assert good["out"].strip(), "the program goes on"
    assert findings_in(folder / "report.json") == []
    bad = run(*OPTIONS, "--fail", "--stop", str(plant(bug, programs, folder)), folder=folder)
    assert bad["code"] == 1, bad["err"]
    check_found(bug, findings_in(folder / "report.json"))


def findings_in(file: Path) -> list[dict[str, Any]]:
    """What a report holds that is more than a note."""
    report = json.loads(file.read_text("utf-8"))
    assert report["iterations"] >= 4
    return [f for f in report["findings"] if f["severity"] != "note"]


def check_found(bug: Bug, found: list[dict[str, Any]]) -> None:
    """One of the findings names the bug, its parameters and its line."""
    named = [f for f in found if f["code"] == bug.code]
    wheres = [name.rpartition("_0.")[2] for f in named for name in f["where"]]
    assert set(bug.where) <= set(wheres), found
    if bug.line is not None:
        assert bug.line in [f["quote"].partition("  #")[0] for f in named], found
