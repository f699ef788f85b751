"""One process, DDP and FSDP2 hold the same parameters in the same sets, with the same numbers."""

import pytest
import torch
from tests.gloo import spawn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import learnables as ln
from learnables.entries import entries
from learnables.errors import LearnablesWarning
from learnables.sets.batch import placing_of
from learnables.sets.constraint import as_constraint


class Net(nn.Module):
    """Every way a constraint can meet a shard of rows; two ranks do not divide the sizes evenly."""

    def __init__(self) -> None:
        super().__init__()
        orthogonal, made = ln.sets.Orthogonal(), ln.sets.Constraint
        torch.manual_seed(0)

        def weight(n: int, k: int, constraint: object) -> nn.Parameter:
            return ln.parameter(n, k, init=nn.init.normal_, constraint=constraint)

        self.tall = weight(7, 5, orthogonal)
        self.tall_too = weight(7, 5, orthogonal)
        self.tangent = weight(7, 5, made(orthogonal, how="tangent", momentum=True))
        self.lazy = weight(6, 5, made(orthogonal, lazy=1e-4))
        self.wide = weight(3, 5, orthogonal)
        self.clipped = weight(9, 5, ln.sets.SpectralBall(0.7))
        self.heads = weight(10, 5, made(orthogonal, view="heads:2"))
        self.columns = weight(7, 5, made(ln.sets.Sphere(), view="cols"))
        self.rows = weight(7, 5, ln.sets.Sphere())
        self.weights = weight(7, 5, ln.sets.Simplex())
        self.gates = weight(7, 5, ln.sets.NonNegative())
        self.sphere = ln.parameter(5, init=nn.init.normal_, constraint=ln.sets.Sphere())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((x * self.sphere @ p.T).square().sum() for p in self.parameters() if p.ndim == 2)


#: What each parameter needs of the other ranks, where it is sharded by rows.
PLACES = {
    "tall": "rows",
    "tall_too": "rows",
    "tangent": "rows",
    "lazy": "rows",
    "wide": "whole",
    "clipped": "rows",
    "heads": "whole",
    "columns": "whole",
    "rows": "here",
    "weights": "here",
    "gates": "here",
    "sphere": "whole",
}


def _trained(model: nn.Module, module: nn.Module) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.003, momentum=0.9)
    ln.attach(module, optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        optimizer.zero_grad()
        module(torch.randn(4, 5, generator=generator)).backward()
        optimizer.step()
    found = ln.violation(module)
    assert len(found) == len(PLACES)
    assert max(v for n, v in found.items() if not n.endswith("lazy")) <= 1e-5, found
    whole = {}
    for name, p in model.named_parameters():
        whole[name] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
    return whole


def _compare(wanted: dict[str, torch.Tensor]) -> None:
    model = Net()
    parallel = _trained(model, DistributedDataParallel(model))
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    for entry in entries(model):
        constraint = as_constraint(entry.places[0].note.get("constraint"))
        assert placing_of(entry.param, constraint) == PLACES[entry.name], entry.name
    sharded = _trained(model, model)
    for name, value in wanted.items():
        torch.testing.assert_close(parallel[name], value, rtol=0, atol=0, msg=f"ddp {name}")
        torch.testing.assert_close(
            sharded[name], value, rtol=0, atol=2e-6, msg=lambda m, n=name: f"fsdp {n}: {m}"
        )


class Tied(nn.Module):
    def __init__(self, transpose: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode = nn.Linear(6, 6, bias=False)
        self.decode = nn.Linear(6, 6, bias=False)
        ln.tie(self, "decode.weight", "encode.weight", transpose)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(torch.tanh(self.encode(x))).square().sum()


def _tied_trained(model: nn.Module, module: nn.Module) -> torch.Tensor:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    assert len(optimizer.param_groups[0]["params"]) == 1
    ln.constrain(
        module,
        [f"*{name}" for name in ("encode.weight", "decode.weight")],
        ln.sets.Orthogonal(),
        optimizer=optimizer,
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(4, 6, generator=generator)).backward()
        optimizer.step()
    p = model.encode.weight
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()


def _compare_tied(wanted: list[torch.Tensor]) -> None:
    for transpose, value in zip((False, True), wanted, strict=True):
        model = Tied(transpose)
        got = _tied_trained(model, DistributedDataParallel(model))
        torch.testing.assert_close(got, value, rtol=0, atol=0)
        model = Tied(transpose)
        mesh = init_device_mesh("cpu", (2,))
        fully_shard([model.encode, model.decode], mesh=mesh)  # both owners in one group
        fully_shard(model, mesh=mesh)
        got = _tied_trained(model, model)
        torch.testing.assert_close(got, value, rtol=0, atol=1e-5)


def _keep_nan(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.a = ln.parameter(6, 4, init=nn.init.normal_, constraint=ln.sets.Orthogonal())
    model.b = ln.parameter(6, 4, init=nn.init.normal_, constraint=ln.sets.Orthogonal())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ln.attach(model, optimizer)
    with torch.no_grad():
        if rank == 1:  # one rank only: the sum of the Gram matrices tells both
            model.a.to_local()[0, 0] = torch.nan
        model.b.to_local().add_(0.01)
    with pytest.warns(LearnablesWarning, match="where: a"):
        optimizer.step()
    assert model.a.full_tensor().isnan().sum() == 1
    assert ln.violation(model)["b"] <= 1e-5


def _on_each_rank(rank: int, wanted: dict[str, torch.Tensor], tied: list[torch.Tensor]) -> None:
    _compare(wanted)
    _compare_tied(tied)
    _keep_nan(rank)


def test_one_process_ddp_and_fsdp2_agree_ties_hold_and_a_nan_is_seen_by_all() -> None:
    model, pair = Net(), [Tied(False), Tied(True)]
    spawn(_on_each_rank, 2, _trained(model, model), [_tied_trained(m, m) for m in pair])
