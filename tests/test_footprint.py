"""What is reckoned is what is kept and sent."""

import json

import pytest
import torch
from tests.gloo import spawn
from tests.launch.test_two_ranks import Net, Stored, adam, built, loss_of
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import learnables as ln
from learnables._torch import local
from learnables.cli import app
from learnables.errors import LearnablesError
from learnables.footprint import footprint


class Sent(TorchDispatchMode):
    """Bytes that FSDP2 hands to gather and scatter, less those that stay on the rank."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if "_allgather_base_" in name:
            self.bytes += args[0].nbytes - args[1].nbytes
        elif "_reduce_scatter_base_" in name:
            self.bytes += args[1].nbytes - args[0].nbytes
        return function(*args, **(kwargs or {}))


def kept(model, optimizer):
    states = [x for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x)]
    return {
        "parameters": sum(local(p).nbytes for p in model.parameters()),
        "gradients": sum(local(p.grad).nbytes for p in model.parameters()),
        "optimizer": sum(local(x).nbytes for x in states),
    }


def measure(rank, strategy, path):
    model, optimizer, _ = ln.prepare(built(), adam, strategy)
    sent = Sent()
    if strategy == "ddp":
        sizes = []
        model.register_comm_hook(None, lambda _, bucket: reduced(bucket, sizes))
        loss_of(model).backward()
        sent.bytes = sum(sizes)  # of 2 ranks, all goes round once
    else:
        with sent:
            loss_of(model).backward()
    optimizer.step()
    if rank == 0:
        path.write_text(json.dumps({**kept(model, optimizer), "sent": sent.bytes}))


def measure_an_island(rank, path):
    model, optimizer, _ = ln.prepare(Stored(torch.float32, alone=True), adam, "fsdp2")
    with Sent() as sent:
        model(torch.ones(4, 8, dtype=torch.bfloat16)).float().sum().backward()
    optimizer.step()
    if rank == 0:
        path.write_text(json.dumps({**kept(model, optimizer), "sent": sent.bytes}))


def reduced(bucket, sizes):
    sizes.append(bucket.buffer().nbytes)
    return (
        torch.distributed.all_reduce(bucket.buffer(), async_op=True)
        .get_future()
        .then(lambda done: done.value()[0] / 2)
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_keep_and_send_what_was_reckoned(strategy, tmp_path):
    spawn(measure, 2, strategy, tmp_path / "real.json")
    real = json.loads((tmp_path / "real.json").read_text())
    model = built()
    reckoned = footprint(model, adam(model), strategy, ranks=2).to_json()
    assert {name: reckoned[name] for name in real} == real


def test_an_island_of_another_dtype_is_reckoned_as_a_group_of_its_own(tmp_path):
    spawn(measure_an_island, 2, tmp_path / "real.json")
    real = json.loads((tmp_path / "real.json").read_text())
    model = Stored(torch.float32, alone=True)
    reckoned = footprint(model, adam(model), "fsdp2", ranks=2).to_json()
    assert {name: reckoned[name] for name in real} == real


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_what_prepare_would_refuse_is_refused(strategy):
    model = Stored(torch.float8_e5m2, alone=False)
    with pytest.raises(LearnablesError, match="8 bits"):
        footprint(model, strategy=strategy, ranks=2)
    assert footprint(model, strategy="none", ranks=1).parameters == 8 * 8 * 2 + 8 * 2 + 8


def test_one_process_keeps_what_was_reckoned():
    model = built()
    optimizer = adam(model)
    model(torch.randn(2, 5, 8)).square().mean().backward()
    optimizer.step()
    reckoned = footprint(model, optimizer, "none", ranks=1)
    assert {name: reckoned.to_json()[name] for name in kept(model, optimizer)} == kept(
        model, optimizer
    )
    assert reckoned.sent == reckoned.gathered == 0


def test_each_parameter_has_the_state_of_the_optimizer_that_holds_it():
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(3)))
    first, second, _ = model.parameters()  # the third is held by none
    both = [torch.optim.SGD([first], lr=0.1, momentum=0.9), torch.optim.AdamW([second])]
    assert footprint(model, both, "none", ranks=1).optimizer == 16 * 4 + 2 * 16 * 4 + 4


def test_more_ranks_keep_less_and_the_model_is_left_alone():
    model = Net(width=64)
    before = [p.clone() for p in model.parameters()]
    sizes = [footprint(model, ranks=ranks).parameters for ranks in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[3] < sizes[0] / 7
    assert all(map(torch.equal, before, model.parameters()))
    with torch.device("meta"):
        assert footprint(Net(width=64), ranks=8).parameters == sizes[3]


def test_ranks_that_cannot_be_are_refused():
    with pytest.raises(LearnablesError, match="no such ranks"):
        footprint(Net(), "adam", "zero3", ranks=2)
    with pytest.raises(LearnablesError, match="no such ranks"):
        footprint(Net(), ranks=0)


def test_command_prints_what_is_reckoned_without_building_anything(tmp_path):
    script = tmp_path / "huge.py"
    script.write_text(
        "import torch\n"
        "def build():\n"
        "    model = torch.nn.Linear(1 << 20, 1 << 20, bias=False)\n"  # 4 TiB
        "    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)\n"
    )
    arguments = ["plan", f"{script}:build", "--ranks=4", "--strategy=fsdp2"]
    done = CliRunner().invoke(app, [*arguments, "--format=json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["parameters"] == found["optimizer"] == 1 << 40
    assert found["gathered"] == 1 << 42
    assert "1,048,576.00 MiB" in CliRunner().invoke(app, arguments).stdout
    assert CliRunner().invoke(app, [*arguments, "--format=xml"]).exit_code == 2
    assert CliRunner().invoke(app, ["plan", f"{script}:absent"]).exit_code != 0
