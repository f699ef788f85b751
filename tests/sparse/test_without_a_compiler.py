"""A machine that cannot compile, acted out: a build that fails, then a process that trains."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import learnables as ln
from learnables import _native
from learnables.sparse import kernels

ROOT = Path(__file__).parents[2]


def train(dtype: torch.dtype) -> list[float]:
    """Losses of a model whose blocks move while it trains."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).to(dtype)
    ln.sparsify(model, "*", block=16, density=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(200, 64).to(dtype)
    losses = []
    with ln.sparse.evolve(model, optimizer, ln.sparse.RigL(), every=3):
        for _ in range(8):
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def built_in_vain(tmp_path_factory):
    """What ``pip install`` leaves of the kernels where the compiler is missing."""
    folder = tmp_path_factory.mktemp("no compiler")
    build = "import setuptools; setuptools.setup()"
    where = ["--build-lib", str(folder), "--build-temp", str(folder / "temp")]
    done = subprocess.run(
        [sys.executable, "-c", build, "build_ext", *where],
        cwd=ROOT,
        env={**os.environ, "CC": str(folder / "no-such-compiler")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no-such-compiler" in done.stdout + done.stderr
    assert not [*folder.rglob("*.so"), *folder.rglob("*.pyd")]
    return folder


def test_everything_works_and_is_said_once_for_each_dtype(built_in_vain) -> None:
    code = (
        "import json, torch; from tests.sparse.test_without_a_compiler import train; "
        "torch.set_num_threads(1); "
        "print(json.dumps([train(torch.float32), train(torch.bfloat16)]))"
    )
    env = {k: v for k, v in os.environ.items() if k != kernels.FORCE}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**env, _native.FOLDER: str(built_in_vain)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.findall(r"block-sparse products of (\S+) on cpu: torch \((.*)\)", done.stderr)
    assert [dtype for dtype, _ in said] == ["torch.float32", "torch.bfloat16"]
    assert all("block_sparse.c was not built" in why for _, why in said)
    without = torch.tensor(json.loads(done.stdout))
    here = torch.tensor([train(torch.float32), train(torch.bfloat16)])
    torch.testing.assert_close(without[0], here[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(without[1], here[1], rtol=0.05, atol=0.01)
    assert (without[:, -1] < without[:, 0]).all()
