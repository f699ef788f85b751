"""The same blocks on one process, under DDP and under FSDP2."""

import pytest
import torch
import torch.distributed as dist
from tests.gloo import spawn
from torch import nn
from torch.distributed.fsdp import fully_shard

import learnables as ln
from learnables.errors import LayoutError
from learnables.sparse import Prune, RigL, evolve


def train(wrap, rank, ranks):
    torch.manual_seed(0)
    model = nn.Sequential(
        ln.nn.BlockSparseLinear(32, 32, block=8, density=0.25),
        nn.Tanh(),
        ln.nn.BlockSparseLinear(32, 16, block=8, density=0.5),
    )
    layers = [model[0], model[2]]
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    evolution = evolve(wrapped, optimizer, RigL(1.0), every=3)
    target = torch.randn(32, 16)
    for _ in range(7):
        x = torch.randn(16, 32)
        mine = x[rank * 16 // ranks : (rank + 1) * 16 // ranks]
        optimizer.zero_grad()
        (wrapped(mine) - mine @ target).square().mean().backward()
        optimizer.step()
    whole = [getattr(layer.weight, "full_tensor", lambda w=layer.weight: w)() for layer in layers]
    changes = [(c.step, c.layer, c.dropped, c.grown) for c in evolution.history]
    return [layer.layout.mask for layer in layers], [w.detach() for w in whole], changes, optimizer


def compare(rank: int, wanted) -> None:
    masks, weights, changes = wanted
    mesh = dist.init_device_mesh("cpu", (2,))

    def shard(model):
        fully_shard(model, mesh=mesh)
        return model

    for wrap in (nn.parallel.DistributedDataParallel, shard):
        here_masks, here_weights, here_changes, optimizer = train(wrap, rank, 2)
        assert here_changes == changes
        for one, other in zip(here_masks, masks, strict=True):
            assert torch.equal(one, other)
        torch.testing.assert_close(here_weights, weights, rtol=1e-4, atol=1e-5)
    layer = ln.nn.BlockSparseLinear(32, 32, block=8, density=0.25)
    wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(layer))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    evolve(wrapped, optimizer, Prune(0.1), every=1, until=1)
    wrapped(torch.randn(4, 32)).square().mean().backward()
    with pytest.raises(LayoutError, match=r"(?s)DataParallel cannot.*where: 0\.weight"):
        optimizer.step()
    fully_shard(layer, mesh=mesh)
    with pytest.raises(LayoutError, match="cannot change its number of blocks"):
        layer.rewire(torch.ones(4, 4), optimizer)


def test_all_ranks_change_the_same_blocks_as_one_process_does() -> None:
    masks, weights, changes, _ = train(lambda model: model, 0, 1)
    assert len(changes) >= 2
    spawn(compare, 2, (masks, weights, changes))
