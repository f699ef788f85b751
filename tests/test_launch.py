import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.gloo import one_process_group
from torch import nn

import learnables as ln
from learnables.errors import AuditFailed, LearnablesError, SelectionError
from learnables.launch import Prepared, join, make_ready_, placement_for, shard_, units_of


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.mix(x))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x * self.scale


def adam(model):
    return torch.optim.AdamW(ln.param_groups(model, lr=0.1, weight_decay=0.1))


def train(model, optimizer, steps=3):
    for seed in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


# --- one process ----------------------------------------------------------------------------------


def test_what_comes_back_unpacks_into_model_optimizer_and_report():
    model = Tower()
    prepared = ln.prepare(model, adam)
    again, optimizer, report = prepared
    assert isinstance(prepared, Prepared)
    assert again is model
    assert prepared.optimizers == (optimizer,)
    assert report.ok


def test_what_was_declared_is_attached():
    model = nn.Linear(4, 4)
    ln.annotate(model, "weight", constraint=ln.sets.Orthogonal())
    model, optimizer, _ = ln.prepare(model, adam)
    train(model, optimizer)
    assert ln.violation(model)["weight"] < 1e-4


def test_several_optimizers_come_back_in_their_order():
    def two(model):
        params = list(model.parameters())
        return torch.optim.SGD(params[:2], lr=0.1), torch.optim.AdamW(params[2:])

    prepared = ln.prepare(Tower(), two)
    assert [type(o).__name__ for o in prepared.optimizers] == ["SGD", "AdamW"]
    assert prepared.report.ok


def test_forgotten_parameter_ends_the_call():
    with pytest.raises(AuditFailed, match=r"LRN201[\s\S]*first\.weight"):
        ln.prepare(Tower(), lambda model: torch.optim.SGD(model.blocks.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda model: torch.optim.SGD(model.parameters(), lr=0.1), "built too early"),
        (lambda model: torch.optim.SGD, "no function of the model"),
        (lambda model: 3, "no function of the model"),
        (lambda model: lambda model: list(model.parameters()), "has to return an optimizer"),
        (lambda model: lambda model: None, "has to return an optimizer"),
    ],
    ids=["optimizer", "class", "number", "parameters", "nothing"],
)
def test_what_is_no_function_of_the_model_is_refused_with_one(wrong, what):
    model = Tower()
    with pytest.raises(LearnablesError, match=what) as caught:
        ln.prepare(model, wrong(model))
    assert "lambda model: torch.optim.AdamW" in caught.value.mend


def test_strategy_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(LearnablesError, match="ddp, fsdp2"):
        ln.prepare(Tower(), adam, "fsdp1")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_process_that_nobody_else_joins_says_how_to_start_many(strategy, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(LearnablesError, match="this one is alone") as caught:
        ln.prepare(Tower(), adam, strategy)
    assert caught.value.mend.startswith("torchrun")


@pytest.mark.parametrize("absent", ["is_available", "is_gloo_available"])
def test_build_of_torch_without_gloo_is_named(absent, monkeypatch):
    monkeypatch.setattr(torch.distributed, absent, lambda: False)
    with pytest.raises(LearnablesError, match=r"without torch\.distributed|does not have"):
        ln.prepare(Tower(), adam, "ddp")


def test_build_of_torch_without_nccl_is_named_and_the_cpu_offered(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(LearnablesError, match=r"over nccl, which this build does not") as caught:
        join("cuda")
    assert caught.value.mend == "ln.prepare(model.cpu(), …)"


def test_model_without_values_is_refused():
    with torch.device("meta"):
        model = Tower()
    with pytest.raises(LearnablesError, match=r"no values yet[\s\S]*scale"):
        ln.prepare(model, adam)


# --- how a parameter is cut -----------------------------------------------------------------------


@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(1, 8))
def test_cut_is_even_wherever_one_can_be(shape, parts):
    dim = placement_for(shape, parts).dim
    fair = [d for d, size in enumerate(shape) if size and size % parts == 0]
    if not fair:
        assert dim == 0
    else:
        assert shape[dim] % parts == 0
        assert dim == 0 or (0 not in fair and shape[dim] == max(shape[d] for d in fair))


def test_tied_modules_stay_in_the_group_of_the_rest():
    model = Tower()
    assert units_of(model) == list(model.blocks)
    ln.tie(model, "blocks.1.mix.weight", "first.weight")
    assert units_of(model) == [model.blocks[0], model.blocks[2]]
    ln.tie(model, "blocks.2.mix.weight", "blocks.0.mix.weight")
    assert units_of(model) == []


def test_units_are_named_by_globs_and_an_empty_pick_is_an_error():
    model = Tower()
    assert units_of(model, ["blocks.*"]) == list(model.blocks)  # their inner parts go with them
    assert units_of(model, ["first", "blocks.2"]) == [model.first, model.blocks[2]]
    assert units_of(model, []) == []
    with pytest.raises(SelectionError, match=r"blocs"):
        units_of(model, ["blocs.*"])


def test_scalars_and_layouts_are_mended_before_sharding_and_ties_stay():
    model = Tower()
    model.again = nn.Module()
    model.again.scale = model.scale
    model.first.weight = nn.Parameter(torch.randn(4, 4).t())
    before = copy.deepcopy(model)
    make_ready_(model)
    assert model.scale.shape == (1,)
    assert model.again.scale is model.scale
    assert model.first.weight.is_contiguous()
    x = torch.randn(2, 4)
    torch.testing.assert_close(model(x), before(x))
    model.load_state_dict(before.state_dict())  # () into (1,)
    before.load_state_dict(model.state_dict())  # and back


def test_sparse_parameter_is_refused_by_name():
    model = nn.Module()
    model.mask = nn.Parameter(torch.eye(4).to_sparse())
    with pytest.raises(LearnablesError, match=r"sparse[\s\S]*mask"):
        make_ready_(model)


# --- wrapped and sharded, in a group of one -------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_one_rank_trains_as_no_group_does(strategy):
    torch.manual_seed(0)
    plain = Tower()
    alone = copy.deepcopy(plain)
    train(*list(ln.prepare(alone, adam))[:2])
    with one_process_group():
        model, optimizer, report = ln.prepare(plain, adam, strategy)
        assert report.ok
        train(model, optimizer)
        values = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    for ours, theirs in zip(values, alone.parameters(), strict=True):
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs)


def test_function_that_returns_an_optimizer_of_before_is_found_by_the_audit():
    model = Tower()
    early = adam(model)
    with one_process_group(), pytest.raises(AuditFailed, match="LRN904"):
        ln.prepare(model, lambda _: early, "fsdp2")


def test_method_beside_forward_may_use_what_is_sharded():
    class Encoder(Tower):
        def encode(self, x):
            return self.first(x) * self.scale

    with one_process_group():
        model = shard_(Encoder(), methods=("encode",))
        assert model.encode(torch.ones(1, 4)).shape == (1, 4)
        with pytest.raises(LearnablesError, match="no such method"):
            shard_(Encoder(), methods=("decode",))
