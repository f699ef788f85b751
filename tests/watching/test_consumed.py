"""The recorded gradient is the one that the optimizer consumed: the 48 cells of the benchmark.

In each the new weight is minus the gradient that was consumed, so that it need not be asked for.
"""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from tests.gloo import spawn

import learnables as ln

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def cells():
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    import watch_gradients

    return watch_gradients


def two_ranks(rank, folder):
    warnings.filterwarnings("ignore", category=UserWarning)
    for world in ("DDP", "FSDP2"):
        found = [
            cells().cell(*cell, world, f"{folder}/{world}-{i}")
            for i, cell in enumerate(cells().CELLS)
        ]
        if rank == 0:
            torch.save(found, f"{folder}/{world}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    spawn(two_ranks, 2, str(folder))
    return folder


STAGES = {
    "fp32": ["step"],
    "fp16, scaler, fused": ["step, divided by the scale"],
    "fp16, scaler": ["step", "step, skipped by the scaler"],
    "bf16": ["step"],
}


def assert_good(found, precision, clip):
    assert found["equal"], found
    assert found["skips marked"], found
    # Who clips has the scaler divide before, so that a fused optimizer need not.
    wanted = STAGES["fp32" if clip and "fused" in precision else precision]
    assert found["stage"] == wanted


@pytest.mark.parametrize("cell", cells().CELLS, ids=str)
def test_in_one_process(cell, tmp_path):
    found = cells().cell(*cell, "1 process", str(tmp_path / "run"))
    assert_good(found, cell[0], cell[2])


@pytest.mark.parametrize("world", ["DDP", "FSDP2"])
def test_over_two_ranks(world, folder):
    found = torch.load(folder / f"{world}.pt", weights_only=True)
    assert len(found) == len(cells().CELLS) == 16
    for cell, one in zip(cells().CELLS, found, strict=True):
        assert_good(one, cell[0], cell[2])


@pytest.mark.parametrize("quantity", ["gradient", "update"])
def test_a_record_that_is_off_by_one_bit_is_told(quantity, tmp_path):
    """The judge of the cells can say no."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    consumed = []
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        for _ in range(3):
            optimizer.zero_grad()
            for p in model.parameters():
                p.data.zero_()
            (model(torch.ones(4, 2)) - 0.3).square().mean().backward()
            optimizer.step()
            consumed.append({n: -p.detach().clone() for n, p in model.named_parameters()})
    run = watcher.run()
    judge = cells().judge
    assert judge(run, consumed, [{}] * 3, False)["equal"]
    moments = run.observations[1].rows[quantity].moments
    moments["min"][0] = torch.nextafter(torch.tensor(moments["min"][0]), torch.tensor(1.0))
    assert not judge(run, consumed, [{}] * 3, False)["equal"]
