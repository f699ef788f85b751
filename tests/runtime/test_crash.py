"""A crash at any system call of a save leaves the old checkpoint or the new one, whole."""

import errno
import os
import signal
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.crash import Fate, failing_at, killed_at, why_not
from tests.forked import fork
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import learnables as ln
from learnables.errors import CheckpointError
from learnables.runtime.checkpoint import read_checkpoint

_SHARES = 8
pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


def build(step: int):
    """A model whose every value is the step."""
    model = nn.Linear(300, 100)  # 120 kB: more than one write
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(step)
            optimizer.state[p]["momentum_buffer"] = p.detach().clone()
    return model, optimizer


def holds(path) -> int:
    """The step that the file is of; every value in it must agree."""
    checkpoint = read_checkpoint(path)
    values = [*checkpoint.model.values()]
    (saved,) = checkpoint.meta["optimizers"]
    values += [state["momentum_buffer"] for state in saved["state"].values()]
    assert len(values) == 4
    assert all(bool((x == checkpoint.step).all()) for x in values)
    return checkpoint.step


def save_twice(folder):
    path = folder / "c.safetensors"
    ln.save_checkpoint(path, *build(1), step=1)
    model, optimizer = build(2)
    return path, lambda: ln.save_checkpoint(path, model, optimizer, step=2)


def test_killed_at_every_system_call(tmp_path):
    path, save = save_twice(tmp_path)
    found, call = [], 1
    while True:
        fate = killed_at(call, save)
        found.append(holds(path))
        if not fate.reached:
            assert fate.status == 0
            break
        if found[-1] == 2:
            ln.save_checkpoint(path, *build(1), step=1)
        call += 1
    assert call > 20, "there were system calls to be killed at"
    assert found[0] == 1
    assert found[-1] == 2
    assert found == sorted(found), "old up to the replacement, new from then on"
    save()  # what the killed ones left behind is swept up
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_killed_at_every_system_call_of_the_very_first_save(tmp_path):
    model, optimizer = build(1)
    call, there = 1, []
    while True:
        folder = tmp_path / str(call)
        path = folder / "deep" / "c.safetensors"
        fate = killed_at(call, partial(ln.save_checkpoint, path, model, optimizer, step=1))
        there.append(path.exists() and holds(path) == 1)
        if not fate.reached:
            break
        call += 1
    assert there == sorted(there)
    assert there[-1]


class TwoRanks:
    """A model that two processes share by FSDP2; `save` is called on both."""

    def __init__(self, folder: Path, *, sharded: bool = False) -> None:
        self.sharded = sharded
        self.path, self.meeting = folder / "c.safetensors", folder / "meeting"
        self.meeting.mkdir()
        self.turn = 0

    def join(self, rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{self.meeting}/{self.turn}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=20),
        )
        model = fully_shard(nn.Linear(300, 100), mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(2)
                optimizer.state[p]["momentum_buffer"] = p.detach().clone()
        self.held = model, optimizer

    def save(self) -> None:
        ln.save_checkpoint(self.path, *self.held, step=2, sharded=self.sharded)

    def killed_at(self, call: int) -> Fate:
        """Save in two processes, of which the writing one is killed."""
        self.turn += 1

        def other() -> None:
            with suppress(RuntimeError):  # the first is gone in the middle of a collective
                self.join(1)
                self.save()
            os._exit(0)

        second = fork(other)
        try:
            return killed_at(call, self.save, prepare=partial(self.join, 0))
        finally:
            os.kill(second, signal.SIGKILL)
            os.waitpid(second, 0)


def survives(ranks: TwoRanks, call: int) -> Fate:
    """Kill at this call; what is there must be whole, and old only before the end."""
    fate = ranks.killed_at(call)
    step = holds(ranks.path)  # of sharded ones, every part of all ranks
    assert step == 2 or fate.reached
    if step == 2:
        ln.save_checkpoint(ranks.path, *build(1), step=1)
    return fate


@pytest.mark.parametrize("sharded", [False, True], ids=["gathered", "sharded"])
def test_the_writing_one_of_two_ranks_is_killed(tmp_path, sharded):
    ranks = TwoRanks(tmp_path, sharded=sharded)
    ln.save_checkpoint(ranks.path, *build(1), step=1)
    last = survives(ranks, 10**9).calls
    for call in range(last, 1, -max(1, last // (3 if sharded else 5))):
        survives(ranks, call)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["gathered", "sharded"])
def test_the_writing_one_of_two_ranks_is_killed_at_every_system_call(tmp_path, sharded):
    ranks = TwoRanks(tmp_path, sharded=sharded)
    ln.save_checkpoint(ranks.path, *build(1), step=1)
    survives(ranks, 10**9)  # reads what was saved, so that all is imported before the next fork
    call = 1
    while survives(ranks, call).reached:
        call += 1
    assert call > (100 if sharded else 20)
    print(f"killed at each of {call} system calls")


@pytest.mark.slow
@pytest.mark.parametrize("share", range(_SHARES))
def test_the_first_sharded_save_of_a_process_is_killed_at_every_system_call(tmp_path, share):
    """Nine calls of ten are those of imports; a process that has not imported yet makes them all.

    In eight shares, of 100 seconds each; run one by one (``-k "every_system_call and [3]"``), or
    what one has imported the others need not.
    """
    ranks = TwoRanks(tmp_path, sharded=True)
    ln.save_checkpoint(ranks.path, *build(1), step=1)

    def look() -> None:
        os._exit(holds(ranks.path))

    call, reached = 1 + share, True
    while reached:
        reached = ranks.killed_at(call).reached
        _, status = os.waitpid(fork(look), 0)  # so that it is not this process that imports
        step = os.waitstatus_to_exitcode(status)
        assert step == 2 or (step == 1 and reached), call
        if step == 2:
            ln.save_checkpoint(ranks.path, *build(1), step=1)
        call += _SHARES
    print(f"killed at each {_SHARES}th of {call} system calls, from {1 + share} on")


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EACCES], ids=errno.errorcode.get)
def test_every_call_of_the_disk_fails_in_turn(tmp_path, error):
    path, save = save_twice(tmp_path)

    def tells():
        try:
            save()
        except CheckpointError as told:
            os._exit(50 if "untouched" in told.mend else 51)

    call, ends = 1, []
    while True:
        fate = failing_at(call, tells, error)
        if not fate.reached:
            assert holds(path) == 2
            break
        found = holds(path)
        ends.append((fate.status, found))
        if found == 2:
            ln.save_checkpoint(path, *build(1), step=1)
        call += 1
    assert len(ends) >= 6, "there were calls to fail"
    # What fails is told, and is then as it was; after the replacement it may be either.
    assert set(ends) <= {(50, 1), (50, 2), (0, 2)}
    assert (50, 1) in ends
