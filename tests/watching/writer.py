"""Processes for tests that kill or starve them: forked from one that has imported torch."""

import contextlib
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

import learnables as ln
import learnables.watching  # now, in the server that the others are forked from

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.watching.writer"])


def told_by(function: Callable[..., None], *args: Any) -> Any:
    """What ``function(*args, told)`` sends through ``told``, run in another process."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=function, args=(*args, theirs))
    process.start()
    theirs.close()
    with contextlib.closing(ours):
        told = ours.recv()
    process.join()
    return told


def write(folder: str, told) -> None:
    """Train and record for ever; send the number of each step that is behind us."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with ln.watch(model, optimizer, every=1, to=folder, budget=None) as watcher:
        told.send(0)
        while True:
            optimizer.zero_grad()
            model(torch.ones(1, 20)).sum().backward()
            optimizer.step()
            watcher.log_scalars(watcher.step, {"loss": float(watcher.step)})
            told.send(watcher.step)
