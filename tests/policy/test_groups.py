import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.gloo import one_process_group
from tests.handwritten import DECAYED, Handwritten, Wrapper
from torch import nn

import learnables as ln
from learnables.errors import PolicyError, SelectionError


def decayed(model: nn.Module, weight_decay: float = 0.1) -> set[str]:
    groups = ln.param_groups(model, lr=1e-3, weight_decay=weight_decay)
    return {n for g in groups if g["weight_decay"] > 0 for n in g["param_names"]}


def test_of_25_handwritten_parameters_only_the_three_matrices_are_decayed() -> None:
    model = Handwritten()
    assert len(list(model.parameters())) == 25
    assert decayed(model) == DECAYED


def test_the_same_when_wrapped_in_a_module() -> None:
    assert decayed(Wrapper()) == {f"backbone.{name}" for name in DECAYED}


def test_the_same_when_compiled() -> None:
    assert decayed(torch.compile(Handwritten())) == {f"_orig_mod.{name}" for name in DECAYED}


def test_the_same_under_ddp_and_all_of_it_together() -> None:
    with one_process_group():
        model = nn.parallel.DistributedDataParallel(torch.compile(Wrapper()))
        wanted = {f"module._orig_mod.backbone.{name}" for name in DECAYED}
        assert decayed(model) == wanted


def test_groups_are_complete_disjoint_and_named_as_torch_names_them() -> None:
    model = Handwritten()
    groups = ln.param_groups(model, lr=1e-3, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups)
    names = [n for g in optimizer.param_groups for n in g["param_names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    state = optimizer.state_dict()
    assert [g["param_names"] for g in state["param_groups"]] == [g["param_names"] for g in groups]


@given(
    frozen=st.sets(st.sampled_from([n for n, _ in Handwritten().named_parameters()]), max_size=24),
    scaled=st.sets(st.sampled_from([n for n, _ in Handwritten().named_parameters()])),
)
def test_any_declaration_leaves_every_trainable_parameter_in_exactly_one_group(
    frozen: set[str], scaled: set[str]
) -> None:
    model = Handwritten()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if scaled:
        ln.annotate(model, sorted(scaled), lr_scale=0.5, weight_decay=0.3)
    groups = ln.param_groups(model, lr=1.0, weight_decay=0.1)
    names = [n for g in groups for n in g["param_names"]]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    for group in groups:
        for name in group["param_names"]:
            assert group["lr"] == (0.5 if name in scaled else 1.0)
            assert (group["weight_decay"] == 0.3) == (name in scaled)


def test_a_tied_parameter_is_counted_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    groups = ln.param_groups(model, lr=1.0)
    assert [n for g in groups for n in g["param_names"]] == ["embed.weight"]


def test_muon_gets_hidden_matrices_and_adamw_everything_else() -> None:
    model = nn.Sequential()
    model.embed = nn.Embedding(7, 4)
    model.hidden = nn.Linear(4, 6)
    model.conv = nn.Conv2d(1, 2, 3)
    model.prompt = nn.Parameter(torch.zeros(3, 4))
    model.head = nn.Linear(6, 7)
    matrices, rest = ln.param_groups(model, lr=1e-2, weight_decay=0.1, split="muon")
    assert [n for g in matrices for n in g["param_names"]] == ["hidden.weight"]
    torch.optim.Muon(matrices)
    torch.optim.AdamW(rest)
    names = {n for g in (*matrices, *rest) for n in g["param_names"]}
    assert names == {n for n, _ in model.named_parameters()}


def test_a_tag_overrules_the_muon_routing_and_a_vector_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ln.annotate(model, "0.weight", tags=["adamw"])
    matrices, _ = ln.param_groups(model, lr=1.0, split="muon")
    assert [n for g in matrices for n in g["param_names"]] == ["1.weight"]
    ln.annotate(model, "0.bias", tags=["muon"])
    with pytest.raises(PolicyError, match="Muon takes matrices only"):
        ln.param_groups(model, lr=1.0, split="muon")


def test_the_learning_rate_scale_is_multiplied_in() -> None:
    model = nn.Linear(2, 2)
    groups = ln.param_groups(model, lr=0.1, policy={"bias": {"lr_scale": 3.0}})
    assert {n: g["lr"] for g in groups for n in g["param_names"]} == {
        "weight": 0.1,
        "bias": pytest.approx(0.3),
    }


def test_a_scale_without_a_rate_to_scale_is_refused() -> None:
    model = nn.Linear(2, 2)
    ln.annotate(model, "bias", lr_scale=3.0)
    with pytest.raises(PolicyError, match="needs a learning rate"):
        ln.param_groups(model)
    assert len(ln.param_groups(model, lr=1.0)) == 2


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(SelectionError, match="no trainable parameter"):
        ln.param_groups(nn.Linear(2, 2).requires_grad_(False))


class Declared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = ln.parameter(
            torch.eye(4), weight_decay="init", lr_scale=2.0, tags=["mix"], dtype=torch.float32
        )
        self.proj = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x @ self.mix)


def round_trip_pickle(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def assign_load(model: nn.Module) -> nn.Module:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return model


def nested(model: nn.Module) -> nn.Module:
    return nn.ModuleDict({"outer": nn.ModuleDict({"model": model})})


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.float64),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        round_trip_pickle,
        lambda m: m.to_empty(device="cpu"),
        torch.compile,
        nested,
        assign_load,
    ],
    ids=["to", "deepcopy", "pickle", "torch.save", "to_empty", "compile", "nested", "assign"],
)
def test_a_policy_survives(change) -> None:
    model = change(Declared())
    plan = ln.inventory(model).select("*mix")[0]
    assert plan.weight_decay == "init"
    assert plan.lr_scale == 2.0
    assert "test_groups.py" in plan.why[0]
    assert plan.entry.initial is not None
    torch.testing.assert_close(plan.entry.initial.float(), torch.eye(4))


def test_a_policy_survives_meta_construction() -> None:
    with torch.device("meta"):
        model = Declared()
    assert ln.inventory(model)["mix"].weight_decay == "init"
    model = model.to_empty(device="cpu")
    assert ln.inventory(model)["mix"].weight_decay == "init"


def test_a_policy_survives_ddp_and_fsdp2() -> None:
    from torch.distributed.fsdp import fully_shard

    with one_process_group():
        wrapped = nn.parallel.DistributedDataParallel(Declared())
        assert ln.inventory(wrapped)["module.mix"].weight_decay == "init"
        assert ln.inventory(wrapped)["mix"].lr_scale == 2.0
        sharded = Declared()
        fully_shard(sharded)
        plan = ln.inventory(sharded)["mix"]
        assert plan.weight_decay == "init"
        assert type(plan.entry.param).__name__ == "DTensor"
        optimizer = torch.optim.AdamW(ln.param_groups(sharded, lr=0.1, weight_decay=0.5))
        ln.attach(sharded, optimizer)
        sharded(torch.ones(2, 4)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("wrong", ["*.bias", [nn.Linear(1, 1)], {"*": 0.1}, [("*", "decay")]])
def test_a_policy_that_pairs_nothing_is_refused(wrong):
    with pytest.raises(PolicyError, match="pairs selectors with fields"):
        ln.param_groups(nn.Linear(2, 2), lr=0.1, policy=wrong)
