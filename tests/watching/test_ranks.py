"""`ln.watch` on two real gloo processes, beside the record of one."""

import math
import time

import pytest
import torch
import torch.distributed as dist
from tests.gloo import spawn
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import learnables as ln
from learnables.watching import Run
from learnables.watching.observation import MOMENTS, QUANTITIES

STEPS = 9


class Whole(nn.Module):
    """All its numbers are small multiples of powers of two: however they are added, it is exact."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randint(-8, 8, (6, 7), generator=draw).float())
        self.prompt = nn.Parameter(torch.randint(-8, 8, (1, 7), generator=draw).float() / 4)
        self.tail = nn.Parameter(torch.zeros(5))  # no two ranks share it equally

    def forward(self, x, target):
        out = (x + self.prompt) @ self.weight.detach().T + x @ self.weight.T
        return (out * target).sum(1).mean() + (self.tail * target[:, :5]).sum(1).mean()


def train(model, folder, rows, steps=STEPS, each=lambda step: None, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-4)
    options = {"every": 3, "budget": None, **options}
    with ln.watch(model, optimizer, to=folder, **options) as watcher:
        for step in range(1, steps + 1):
            draw = torch.Generator().manual_seed(step)
            x = torch.randint(-4, 4, (8, 7), generator=draw).float()
            target = torch.randint(-2, 3, (8, 6), generator=draw).float()
            optimizer.zero_grad()
            model(x[rows], target[rows]).backward()
            each(step)
            optimizer.step()
    assert watcher.failed is None, watcher.failed
    return watcher


def wrapped(strategy):
    model = Whole()
    return nn.parallel.DistributedDataParallel(model) if strategy == "ddp" else fully_shard(model)


class Collectives(TorchDispatchMode):
    """Counts what is sent between ranks, whoever sends it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def sent_in_steps(strategy, parameters, folder):
    """The collectives of each of nine optimizer steps, of which 1, 3, 6 and 9 are looked at."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(parameters // 2)))
    model = nn.parallel.DistributedDataParallel(model) if strategy == "ddp" else fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sent = []
    with ln.watch(model, optimizer, every=3, to=folder, budget=None) as watcher:
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.ones(2, 6)).square().mean().backward()
            with Collectives() as counted:
                optimizer.step()
            sent.append(counted.calls)
        with Collectives() as counted:
            watcher.close()
    assert watcher.failed is None
    return [*sent, counted.calls]


def few_collectives(folder):
    """One sum and one maximum for a look that needs them; nothing between, nothing at the end."""
    with Collectives() as counted:  # it sees what it is to count
        dist.all_reduce(torch.ones(1))
    assert counted.calls == 1
    for parameters in (2, 60):
        assert sent_in_steps("ddp", parameters, f"{folder}/ddp {parameters}") == [0] * 10
        sent = sent_in_steps("fsdp2", parameters, f"{folder}/fsdp2 {parameters}")
        assert sent == [2, 0, 2, 0, 0, 2, 0, 0, 2, 0]


def by_seed(strategy, folder, rows):
    """A model of random numbers, whose sums differ in their last bits by who adds them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.LayerNorm(33), nn.Linear(33, 6))
    if strategy == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif strategy == "fsdp2":
        fully_shard(model[0])
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ln.watch(model, optimizer, every=3, to=folder, budget=None) as watcher:
        for step in range(1, STEPS + 1):
            x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x[rows]).square().mean().backward()
            optimizer.step()
    assert watcher.failed is None, watcher.failed


def two_ranks(rank, folder):
    few_collectives(folder)
    for strategy in ("ddp", "fsdp2"):
        by_seed(strategy, f"{folder}/random {strategy}", slice(4 * rank, 4 * rank + 4))
    for strategy in ("ddp", "fsdp2"):
        train(wrapped(strategy), f"{folder}/{strategy}", slice(4 * rank, 4 * rank + 4))
    dist.barrier()

    def stumble(step):
        time.sleep(0.01 if (step + rank) % 2 else 0.0)

    # With the larger budget there is time for about every other check: by its own clock each rank
    # would choose others.
    for budget, every in ((0.002, 12), (0.2, 40)):
        watcher = train(
            wrapped("fsdp2"),
            f"{folder}/{budget}",
            slice(None),
            steps=120,
            each=stumble,
            every=every,
            budget=budget,
        )
        made = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        dist.all_gather(made, torch.tensor([len(watcher.governor._checks)]))
        assert made[0] == made[1]

    model = wrapped("fsdp2")

    def poison(step):
        if step == 4 and rank == 1:
            model.weight.grad.to_local()[1, 2] = math.nan

    train(model, f"{folder}/poisoned", slice(None), each=poison)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(Whole(), folder / "one", slice(None))
    by_seed("", folder / "random one", slice(None))
    spawn(two_ranks, 2, str(folder))
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_record_what_one_process_records_in_every_bit(folder, strategy):
    one, two = Run(folder / "one"), Run(folder / strategy)
    assert [o.step for o in one.observations] == [1, 3, 6, 9]
    assert [o.step for o in two.observations] == [1, 3, 6, 9]
    assert one.gradient_norm.values.tolist() == pytest.approx(two.gradient_norm.values.tolist())
    for a, b in zip(one.observations, two.observations, strict=True):
        assert a.names == tuple(name.removeprefix("module.") for name in b.names)
        for quantity in QUANTITIES:
            x, y = a.rows[quantity], b.rows[quantity]
            assert (x.histogram == y.histogram).all()
            assert x.histogram.sum() == 6 * 7 + 7 + 5
            for name in MOMENTS:
                assert x.moments[name].tolist() == y.moments[name].tolist(), (quantity, name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_norms_of_any_numbers_are_those_of_one_process_to_six_digits(folder, strategy):
    one, two = Run(folder / "random one"), Run(folder / f"random {strategy}")
    assert len(one.observations) == len(two.observations) == 4
    for a, b in zip(one.observations, two.observations, strict=True):
        for quantity in QUANTITIES:
            torch.testing.assert_close(
                torch.tensor(a.rows[quantity].norm),
                torch.tensor(b.rows[quantity].norm),
                rtol=1e-6,
                atol=0,
            )
    mine, theirs = one.gradient_norm, two.gradient_norm
    assert mine.steps.tolist() == theirs.steps.tolist() == list(range(1, STEPS + 1))
    assert mine.values.tolist() == pytest.approx(theirs.values.tolist(), rel=1e-6)


def test_one_file_is_written_by_all_ranks_together(folder):
    for name in ("ddp", "fsdp2", "0.002", "0.2"):
        assert [path.name for path in (folder / name).iterdir()] == ["run.db"]


@pytest.mark.parametrize(
    ("budget", "looks"), [(0.002, [1, 12, 24, 36, 48]), (0.2, [1, 40, 80, 120])]
)
def test_ranks_whose_clocks_differ_look_at_the_same_steps(folder, budget, looks):
    """Were one to look or check while another does not, their numbers could not be added up."""
    run = Run(folder / str(budget))
    assert [o.step for o in run.observations] == looks
    assert not run.damage


def test_the_rank_that_holds_the_first_nan_is_named(folder):
    alarm = Run(folder / "poisoned").alarms[0]
    assert (alarm.kind, alarm.name, alarm.step, alarm.rank) == ("non-finite", "weight", 4, 1)
