"""Process groups for tests: one process in place, or several spawned."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from learnables._torch import end_process_group


@contextlib.contextmanager
def one_process_group() -> Iterator[None]:
    """A gloo group of this process alone: enough for DDP and FSDP2 to wrap a model."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        end_process_group()


def spawn(function: Callable[..., None], ranks: int, *args: Any) -> None:
    """Run ``function(rank, *args)`` in as many processes, all in one gloo group.

    They meet in a file, since a port that is free now may be taken a moment later.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        mp.spawn(_enter, args=(function, ranks, meeting, args), nprocs=ranks)


def _enter(
    rank: int, function: Callable[..., None], ranks: int, meeting: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(minutes=3)
    )
    function(rank, *args)
    dist.barrier()  # nobody leaves while another still talks to it
    end_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads abort now and then when the interpreter is taken down under load
