"""`learnables run` on training programs as people write them: quiet on the good, right on the bad.

Each program is run as it is, where no finding may be more than a note, and with one bug planted,
which has to be named, at its line where a line is to blame.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.scripts.planting import (
    OPTIONS,
    ROOT,
    Bug,
    Run,
    check_found,
    check_good_and_bad,
    findings_in,
    plant,
    zygote,
)

PROGRAMS = Path(__file__).parent / "programs"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


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


@pytest.fixture(scope="module")
def learnables() -> Iterator[Run]:
    """A function that runs a command line of `learnables` in a folder."""
    if not hasattr(os, "fork"):
        pytest.skip("runs the programs in forked processes")
    with zygote(ENVIRONMENT) as run:
        yield run


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.program.removesuffix(".py"))
def test_a_good_program_raises_no_alarm_and_a_planted_bug_is_named(
    bug: Bug, learnables: Run, tmp_path: Path
) -> None:
    check_good_and_bad(bug, PROGRAMS, learnables, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("planted", [False, True])
def test_the_same_under_torchrun(planted: bool, tmp_path: Path) -> None:
    program = plant(RANKS, PROGRAMS, tmp_path) if planted else PROGRAMS / RANKS.program
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, *ranks, "-m", "learnables", *OPTIONS, "--fail", str(program)]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env=ENVIRONMENT,
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
