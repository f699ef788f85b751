"""`learnables run`: a script runs as Python runs it, and is told what is wrong while it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NET = """\
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(x * self.scale.data)
"""
LOOP = """
torch.manual_seed(0)
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for i in range(ITERATIONS):
    optimizer.zero_grad()
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    optimizer.step()
    print(i, loss.item().hex(), flush=True)
"""
PATCHED = """
import torch
from torch.nn.modules import module as m
from torch.optim import optimizer as o
print([f.__module__ for f in (torch.autograd.backward, o.Optimizer.__init__, o.Optimizer.zero_grad,
       torch.nn.Module.zero_grad, torch.compile, m._has_any_global_hook)],
      bool(m._global_forward_pre_hooks), bool(m._global_parameter_registration_hooks),
      bool(o._global_optimizer_pre_hooks), torch._C._len_torch_function_stack(),
      any(type(f).__module__.startswith("learnables") for f in __import__("sys").meta_path))
"""


def python(
    folder: Path, *words: str, check: bool = False, **environment: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=check,
    )


def learnables(folder: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return python(folder, "-m", "learnables", *words, **environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").touch()
    (tmp_path / "pkg" / "net.py").write_text(NET)
    head = (
        "import os, sys\n"
        "print(sys.argv, __name__, __file__, __package__, sys.path[0], 'torch' in sys.modules)\n"
        "os.environ['SEEN'] = 'x'\n"
        "assert sys.modules['__main__'].__dict__ is globals()\n"
        "import torch\n"
    )
    tail = "import atexit\natexit.register(lambda: print(sys.modules['__main__'].__name__))\n"
    tail += "sys.exit(3)\n"
    loop = LOOP.replace("ITERATIONS", "7") + PATCHED + tail
    (tmp_path / "train.py").write_text(head + "from pkg.net import Net\n" + loop)
    (tmp_path / "pkg" / "train.py").write_text(head + "from .net import Net\n" + loop)
    return tmp_path


@pytest.mark.parametrize("how", [["train.py"], ["-m", "pkg.train"]])
def test_the_script_sees_what_python_would_show_it(folder: Path, how: list[str]) -> None:
    arguments = ["--lr", "1", "-m", "--steps=x"]
    plain = python(folder, *how, *arguments)
    ours = learnables(folder, "run", *how, *arguments)
    assert plain.returncode == ours.returncode == 3, ours.stderr
    assert ours.stdout == plain.stdout
    assert plain.stderr == ""
    assert "LRN301 no gradient arrives" in ours.stderr
    at = f"at: pkg{os.sep}net.py:11  return self.head(x * self.scale.data)"
    assert at in ours.stderr
    assert "after 4 iterations" in ours.stderr


def test_stop_fail_output_and_steps(folder: Path) -> None:
    options = ["--stop", "--fail", "--steps", "2", "--format", "json", "--output", "r/report.json"]
    done = learnables(folder, "run", *options, "train.py")
    assert done.returncode == 1
    assert done.stdout.count("0x") == 2  # two iterations, and the third did not begin
    report = json.loads((folder / "r" / "report.json").read_text())
    assert report["iterations"] == 2
    assert [f["where"] for f in report["findings"] if f["severity"] == "error"] == [["scale"]]
    done = learnables(folder, "run", "--stop", "--fail", "--ignore", "LRN3", "train.py")
    assert done.returncode == 0, done.stderr


def test_an_error_of_the_script_is_shown_as_python_shows_it(folder: Path) -> None:
    broken = f"import torch\nfrom pkg.net import Net\n{LOOP.replace('ITERATIONS', '2')}"
    (folder / "broken.py").write_text(f"{broken}\ndef f():\n    1 / 0\nf()\n")
    plain = python(folder, "broken.py")
    ours = learnables(folder, "run", "broken.py")
    assert plain.returncode == ours.returncode == 1
    assert ours.stderr.endswith(plain.stderr)
    assert "after 2 iterations of broken.py" in ours.stderr


def test_a_script_that_never_steps_is_told_so(folder: Path) -> None:
    (folder / "idle.py").write_text("import torch\nprint(torch.ones(1).item())\n")
    done = learnables(folder, "run", "idle.py")
    assert (done.returncode, done.stdout) == (0, "1.0\n")
    assert "no optimizer stepped" in done.stderr
    (folder / "plain.py").write_text("print(1)\n")
    done = learnables(folder, "run", "--fail", "plain.py")
    assert (done.returncode, done.stdout) == (2, "1\n")
    assert "did not import torch" in done.stderr
    done = learnables(folder, "run", "missing.py")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no such script")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_it_as_it_ends_python(folder: Path) -> None:
    loop = LOOP.replace("range(ITERATIONS)", "__import__('itertools').count()")
    (folder / "endless.py").write_text(f"import torch\nfrom pkg.net import Net\n{loop}")
    running = subprocess.Popen(
        [sys.executable, "-m", "learnables", "run", "--steps", "3", "endless.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    for _ in range(5):
        running.stdout.readline()
    running.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    while running.poll() is None and time.monotonic() < deadline:
        running.stdout.readline()
    _, errors = running.communicate(timeout=60)
    assert running.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "LRN301" in errors
    assert "learnables/auditing/script.py" not in errors


def test_workers_of_a_data_loader_inherit_nothing(folder: Path) -> None:
    (folder / "loader.py").write_text(
        "import torch\nfrom torch.utils.data import DataLoader, Dataset\nfrom pkg.net import Net\n"
        "class Data(Dataset):\n"
        "    def __len__(self): return 64\n"
        "    def __getitem__(self, i):\n"
        "        from torch.optim import optimizer as o\n"
        "        clean = torch._C._len_torch_function_stack() == 0\n"
        "        clean &= not o._global_optimizer_pre_hooks\n"
        "        clean &= torch.autograd.backward.__module__ == 'torch.autograd'\n"
        "        return torch.randn(4), clean\n"
        "model = Net()\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for epoch in range(2):\n"
        "    for x, clean in DataLoader(Data(), 16, num_workers=1):\n"
        "        assert clean.all(), epoch\n"
        "        optimizer.zero_grad()\n"
        "        model(x).square().mean().backward()\n"
        "        optimizer.step()\n"
    )
    done = learnables(folder, "run", "--steps", "6", "loader.py")
    assert done.returncode == 0, done.stderr
    assert "after 6 iterations" in done.stderr


RANKS = """\
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from learnables.launch import leave

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(x * self.gain)

dist.init_process_group("gloo")
torch.manual_seed(0)
model = Net()
ddp = DistributedDataParallel(model)
held = list(model.parameters())
if dist.get_rank() == 1:
    held = held[1:]
optimizer = torch.optim.SGD(held, lr=0.1)
for i in range(6):
    optimizer.zero_grad()
    ddp(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
print(f"rank {dist.get_rank()} done\\n", end="", flush=True)
leave()
"""


def test_under_torchrun_all_ranks_look_and_rank_0_speaks(folder: Path) -> None:
    (folder / "ranks.py").write_text(RANKS)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = python(folder, *words, "-m", "learnables", "run", "--fail", "ranks.py")
    assert "rank 0 done" in done.stdout, done.stderr
    assert "rank 1 done" in done.stdout
    assert done.stderr.count("after 4 iterations of ranks.py") == 1
    assert "LRN201" in done.stderr
    assert "where: module.gain" in done.stderr
    assert "found: on rank 1:" in done.stderr
    assert done.returncode == 1
