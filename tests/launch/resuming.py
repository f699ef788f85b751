"""A run of nine steps that changes its number of ranks on the way; what each process runs."""

from pathlib import Path

import torch
import torch.distributed as dist
from tests.launch.test_two_ranks import adam, built

import learnables as ln
from learnables._torch import rank_and_world


def go_on(rank: int, path: Path, start: int, end: int, strategy: str) -> None:
    """Load ``path`` where there is something to load, write it back, train, save ``path``."""
    model, optimizer, _ = ln.prepare(built(seed=start), adam, strategy)
    if start:
        assert ln.load_checkpoint(path, model, optimizer).step == start
        ln.save_checkpoint(path.with_name(f"loaded-at-{start}.safetensors"), model, optimizer)
    world = rank_and_world()[1]
    for seed in range(start, end):
        rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
        x = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x[rows]).square().mean().backward()
        optimizer.step()
    if world > 1:
        dist.barrier()
    ln.save_checkpoint(path, model, optimizer, step=end)
    if world > 1:
        dist.barrier()
