"""Rows of DTensors are those of the whole tensor, on every rank, in two collectives."""

from dataclasses import fields
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tests.gloo import spawn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from learnables.errors import LearnablesError
from learnables.stats import Statistics, statistics

SPECIAL = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40, 3e38]


def whole_tensors() -> list[Tensor]:
    """The same on every rank."""
    torch.manual_seed(0)
    values = torch.randn(5, 6)
    values.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return [values, torch.randn(7, 3).bfloat16(), torch.randn(1, 4), torch.randn(4).double()]


def assert_same(seen: Statistics, wanted: Statistics) -> None:
    for field in fields(Statistics):
        rtol = 1e-12 if field.name.startswith("sum") else 0.0
        mine, theirs = getattr(seen, field.name), getattr(wanted, field.name)
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol, msg=field.name)


def counting_collectives() -> mock._patch:
    return mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce)


def two_ranks(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = whole_tensors()
    parts = [distribute_tensor(x, mesh, [Shard(0)]) for x in whole]
    parts += [distribute_tensor(x, mesh, [Shard(1)]) for x in whole[:3]]
    parts += [distribute_tensor(x, mesh, [Replicate()]) for x in whole]
    mine = torch.full((2,), float(rank + 1))
    with counting_collectives() as reduced:
        seen = statistics([mine, *parts, mine])
    assert reduced.call_count == 2
    assert_same(seen, statistics([mine, *whole, *whole[:3], *whole, mine]))

    with counting_collectives() as reduced:
        without = statistics(parts[:4], histogram=False)
        copies = statistics(parts[-4:])
    assert reduced.call_count == 2, "replicas are known without asking"
    assert without.histogram is None
    torch.testing.assert_close(without.sum, statistics(whole).sum, rtol=1e-12, atol=0)
    assert_same(copies, statistics(whole))

    every_dtype_and_shape(mesh)

    with pytest.raises(LearnablesError, match="partial DTensor"):
        statistics([DTensor.from_local(mine, mesh, [Partial()])])

    gradients_of_sharded_and_wrapped_models(rank)


def every_dtype_and_shape(mesh: DeviceMesh) -> None:
    """What statistics reads of a plain tensor it reads of a DTensor, two collectives for all."""
    torch.manual_seed(0)
    values = torch.randn(5, 3) * 4
    whole = [
        (values.half(), Shard(0)),
        (values.to(torch.complex64) * (1 - 2j), Shard(1)),
        (values.to(torch.complex128).conj(), Shard(0)),
        (values.to(torch.float8_e4m3fn), Shard(0)),
        (values.long(), Shard(0)),
        (values > 0, Shard(0)),
        (torch.zeros(0, 3), Shard(0)),
        (torch.tensor(-3.0), Replicate()),
        (values.t(), Shard(0)),  # strided
        (values[:1], Shard(0)),  # nothing is left for the second rank
    ]
    cut = partial(distribute_tensor, device_mesh=mesh, src_data_rank=None)  # sends nothing
    parts = [cut(x, placements=[placement]) for x, placement in whole]
    with counting_collectives() as reduced:
        seen = statistics(parts)
    assert reduced.call_count == 2
    assert_same(seen, statistics([x for x, _ in whole]))
    meta = DTensor.from_local(torch.empty(2, device="meta"), mesh, [Shard(0)], run_check=False)
    with pytest.raises(LearnablesError, match="meta tensor holds no values") as caught:
        statistics([values, meta])
    assert caught.value.where == "tensors[1]"


def gradients_of_sharded_and_wrapped_models(rank: int) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 3))

    sharded = model()
    fully_shard(sharded[0])
    fully_shard(sharded)
    for wrapped in (sharded, DistributedDataParallel(model())):
        torch.manual_seed(rank)
        wrapped(torch.randn(4, 6)).square().sum().backward()
        held = [*wrapped.parameters(), *(p.grad for p in wrapped.parameters())]
        with counting_collectives() as reduced:
            seen = statistics(held)
        assert reduced.call_count == (2 if wrapped is sharded else 0)
        full = [x.full_tensor() if isinstance(x, DTensor) else x for x in held]
        assert_same(seen, statistics(full))


def four_ranks(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    whole = whole_tensors()
    layouts = [
        [Shard(0), Replicate()],
        [Replicate(), Shard(0)],
        [Shard(0), Shard(0)],
        [Replicate(), Replicate()],
    ]
    parts = [distribute_tensor(x, mesh, layout) for layout in layouts for x in whole]
    with counting_collectives() as reduced:
        seen = statistics(parts)
    assert reduced.call_count == 2
    assert_same(seen, statistics(whole * len(layouts)))

    with counting_collectives() as reduced:  # HSDP: replicas of shards reduce beside one another
        seen = statistics(parts[4:8])
    assert reduced.call_count == 2
    assert_same(seen, statistics(whole))

    other = [distribute_tensor(x, mesh["data"], [Shard(0)]) for x in whole]
    with counting_collectives() as reduced:
        seen = statistics([parts[0], *other])
    assert reduced.call_count == 4, "two for each mesh"
    assert_same(seen, statistics([whole[0], *whole]))


def test_rows_of_two_ranks_are_those_of_one_process() -> None:
    spawn(two_ranks, 2)


@pytest.mark.slow
def test_rows_of_a_two_dimensional_mesh_are_those_of_one_process() -> None:
    spawn(four_ranks, 4)
