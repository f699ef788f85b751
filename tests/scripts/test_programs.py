"""`learnables run` on training programs as people write them: quiet on the good, right on the bad.

Each program is run as it is, where no finding may be more than a note, and with one bug planted,
which has to be named, at its line where a line is to blame.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Bug:
    """A change to a program, and what has to be said about it.

    Attributes:
        program: File under ``programs``.
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


BUGS = [
    Bug(
        "digits.py",
        "x / self.temperature, dim",
        "x / self.temperature.item(), dim",
        "LRN301",
        ("temperature",),
        "return F.log_softmax(x / self.temperature.item(), dim=1)",
    ),
    Bug(
        "amp.py",
        "        scaler.unscale_(opt)\n",
        "",
        "LRN408",
        ("0.weight", "4.bias"),
        "torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm=0.1)",
    ),
    Bug(
        "accumulate.py",
        "        loss.backward()\n",
        "        optimizer.zero_grad(set_to_none=True)\n        loss.backward()\n",
        "LRN405",
        ("0.weight", "1.bias"),
        "optimizer.zero_grad(set_to_none=True)",
    ),
    Bug(
        "lbfgs.py",
        "nn.Parameter(torch.zeros(1, dtype=torch.double))",
        "torch.zeros(1, dtype=torch.double, requires_grad=True)",
        "LRN101",
        ("offset",),
    ),
    Bug(
        "compiled.py",
        "self.gamma * F",
        "self.gamma.detach() * F",
        "LRN301",
        ("_orig_mod.blocks.0.gamma", "_orig_mod.blocks.1.gamma"),
        "return x + self.gamma.detach() * F.gelu(self.mix(self.norm(self.conv(x))))",
    ),
    Bug(
        "gan.py",
        "optim.Adam(netG.parameters()",
        "optim.Adam(netD.parameters()",
        "LRN202",
        ("main.0.weight", "main.2.bias"),
    ),
    Bug(
        "gpt.py", "if p.dim() < 2]", "if p.dim() < 1]", "LRN201", ("ln_f.weight", "h.0.mlp.0.bias")
    ),
    Bug(
        "finetune.py",
        "(model_conv.fc.parameters(), lr=0.01, momentum=0.9)\n",
        "(model_conv.fc.parameters(), lr=0.01, momentum=0.9)\nmodel_conv.fc = nn.Linear(8, 2)\n",
        "LRN201",
        ("fc.weight", "fc.bias"),
    ),
    Bug(
        "averaging.py",
        "* model.scale,",
        "* model.scale.data,",
        "LRN301",
        ("scale",),
        "loss = loss_fn(model(input) * model.scale.data, target)",
    ),
    Bug(
        "rnn.py",
        "self.decoder(self.drop(output))",
        "self.decoder(self.drop(output.detach()))",
        "LRN301",
        ("rnn.weight_ih_l0", "rnn.bias_hh_l1"),
        "decoded = self.decoder(self.drop(output.detach()))",
    ),
    Bug(
        "reinforce.py",
        "-log_prob * advantage",
        "-log_prob.detach() * advantage",
        "LRN301",
        ("action_head.weight", "action_head.bias"),
        "policy_losses.append(-log_prob.detach() * advantage)",
    ),
]
RANKS = Bug(
    "ddp.py",
    "(ddp_model.parameters(), lr=0.001)",
    "(model.net1.parameters(), lr=0.001)",
    "LRN201",
    ("module.gate", "module.net2.weight"),
)
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def learnables() -> Iterator[Run]:
    """A function that runs a command line of `learnables` in a folder."""
    if not hasattr(os, "fork"):
        pytest.skip("runs the programs in forked processes")
    words = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("zygote.py"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment) as zygote:
        assert zygote.stdin is not None
        assert zygote.stdout is not None

        def run(*words: str, folder: Path) -> dict[str, Any]:
            assert zygote.stdin is not None
            assert zygote.stdout is not None
            zygote.stdin.write(json.dumps({"words": words, "folder": str(folder)}) + "\n")
            zygote.stdin.flush()
            return json.loads(zygote.stdout.readline())

        yield run
        zygote.stdin.close()


def findings_in(file: Path) -> list[dict[str, Any]]:
    report = json.loads(file.read_text("utf-8"))
    assert report["iterations"] >= 4
    return [f for f in report["findings"] if f["severity"] != "note"]


def plant(bug: Bug, folder: Path) -> Path:
    text = (PROGRAMS / bug.program).read_text("utf-8")
    assert text.count(bug.old) == 1, "the bug has one place"
    path = folder / bug.program
    path.write_text(text.replace(bug.old, bug.new), "utf-8")
    return path


def check_found(bug: Bug, found: list[dict[str, Any]]) -> None:
    named = [f for f in found if f["code"] == bug.code]
    wheres = [name.rpartition("_0.")[2] for f in named for name in f["where"]]
    assert set(bug.where) <= set(wheres), found
    if bug.line is not None:
        assert bug.line in [f["quote"].partition("  #")[0] for f in named], found


OPTIONS = ("run", "--format", "json", "--output", "report.json")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.program.removesuffix(".py"))
def test_a_good_program_raises_no_alarm_and_a_planted_bug_is_named(
    bug: Bug, learnables: Run, tmp_path: Path
) -> None:
    good = learnables(*OPTIONS, str(PROGRAMS / bug.program), folder=tmp_path)
    assert good["code"] == 0, good["err"]
    assert good["out"].strip(), "the program goes on"
    assert findings_in(tmp_path / "report.json") == []
    bad = learnables(*OPTIONS, "--fail", "--stop", str(plant(bug, tmp_path)), folder=tmp_path)
    assert bad["code"] == 1, bad["err"]
    check_found(bug, findings_in(tmp_path / "report.json"))


@pytest.mark.slow
@pytest.mark.parametrize("planted", [False, True])
def test_the_same_under_torchrun(planted: bool, tmp_path: Path) -> None:
    program = plant(RANKS, tmp_path) if planted else PROGRAMS / RANKS.program
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, *ranks, "-m", "learnables", *OPTIONS, "--fail", str(program)]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == int(planted), done.stderr
    found = findings_in(tmp_path / "report.json")
    if planted:
        check_found(RANKS, found)
    else:
        assert found == []
