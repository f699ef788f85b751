"""Grafts before wrapping: the same training on one process, under DDP and under FSDP2."""

from pathlib import Path

import torch
import torch.distributed as dist
from tests.gloo import spawn
from tests.grafting.test_graft import SEEN, Attention, Seer, moved
from torch import nn
from torch.distributed.fsdp import fully_shard

import learnables as ln

NAMES = ["prompts.*", "registers.*", "deep.*", "scale.*", "bias.*", "qkv.*", "mlp.*", "head.*"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x).tanh()


class Model(nn.Module):
    """Two stacks, since one stack has either shallow or deep prompts."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.more = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for block in (*self.blocks, *self.more):
            x = block(x)
        return self.head(x.mean(1))


def grafted():
    torch.manual_seed(0)
    model = Model().double()
    made = {
        "registers": (ln.nn.RegisterTokens(2, 8), "blocks.*"),
        "prompts": (ln.nn.Prompts(3, 8, prefix=1), "blocks.*"),
        "deep": (ln.nn.DeepPrompts(2, 3, 8), "more.*"),
        "scale": (ln.nn.LayerScale(8, 0.5), "blocks.1"),
        "bias": (ln.nn.RelativeBias(2, 2), "blocks.*.attention"),
        "qkv": (
            ln.nn.LowRankDelta(24, 8, sections=3, chosen=(0, 2)),
            "more.0.attention.qkv.weight",
        ),
        "mlp": (ln.nn.BlockSparseDelta(8, 8, block=4, density=0.5), "blocks.0.mlp.weight"),
    }
    for name, (component, at) in made.items():
        ln.graft(model, name, component.double(), at)
    ln.train_only(model, NAMES)
    return model


def tokens(generator):
    return torch.randn(8, 4, 8, generator=generator, dtype=torch.float64)


def images(generator):
    return torch.rand(8, 3, 4, 4, generator=generator, dtype=torch.float64)


def train(model, wrapped, rank, ranks, batch=tokens):
    params = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.5)
    data = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = batch(data)
        mine = x[rank * 8 // ranks : (rank + 1) * 8 // ranks]
        optimizer.zero_grad()
        wrapped(mine).square().mean().backward()
        optimizer.step()
    return {
        name: getattr(param, "full_tensor", lambda p=param: p)().detach().clone()
        for name, param in model.named_parameters()
    }


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model):
    mesh = dist.init_device_mesh("cpu", (2,))
    for block in (*model.blocks, *getattr(model, "more", ())):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compare(rank: int, wanted, out, folder: str) -> None:
    for wrap in (ddp, fsdp):
        model = grafted()
        state = train(model, wrap(model), rank, 2)
        assert state.keys() == wanted.keys()
        torch.testing.assert_close(state, wanted, rtol=1e-9, atol=1e-12)
        file = Path(folder) / f"{wrap.__name__}.{rank}"  # gathering is for all, writing for each
        ln.save_delta(model, file)
        base = grafted()
        for handle in reversed([*ln.grafting.grafts_of(base)]):
            handle.remove()
        ln.load_delta(base, file)
        torch.testing.assert_close(base(probe()), out, rtol=1e-9, atol=1e-12)


def probe():
    return torch.linspace(-1, 1, 64, dtype=torch.float64).view(2, 4, 8)


def test_grafts_train_on_two_ranks_as_on_one_and_are_saved_from_both(tmp_path) -> None:
    model = grafted()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    wanted = train(model, model, 0, 1)
    moved = {name for name, value in wanted.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] + ".*" for name in moved} == set(NAMES)
    spawn(compare, 2, wanted, model(probe()).detach(), str(tmp_path))


# --- every kind of component at once -------------------------------------------------------------


def grafted_seer():
    torch.manual_seed(0)
    model = Seer()
    for i, (component, at, where) in enumerate(build() for build in SEEN.values()):
        ln.graft(model, f"kind_{i}", moved(component), at, where=where)
    ln.graft(model, "kind_class", ln.nn.ClassToken(8), "blocks.*")
    ln.train_only(model, ["kind_*", "head.*"])
    return model.double()


def compare_seer(rank: int, wanted) -> None:
    for wrap in (ddp, fsdp):
        model = grafted_seer()
        state = train(model, wrap(model), rank, 2, images)
        torch.testing.assert_close(state, wanted, rtol=1e-9, atol=1e-12)


def test_every_kind_of_component_trains_on_two_ranks_as_on_one() -> None:
    model = grafted_seer()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    wanted = train(model, model, 0, 1, images)
    still = {name for name, value in wanted.items() if torch.equal(value, before[name])}
    assert not any(name.startswith("kind_") for name in still), still
    spawn(compare_seer, 2, wanted)
