"""A tie is one Parameter, and stays one through all that torch does to a model."""

import copy
import pickle

import pytest
import safetensors.torch
import torch
from tests.gloo import one_process_group
from torch import nn

import learnables as ln
from learnables.entries import entries
from learnables.errors import ConstraintError, SelectionError, ShapeError


class Coder(nn.Module):
    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.encode = nn.Linear(4, hidden, bias=False)
        self.decode = nn.Linear(hidden, 4, bias=False)

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


def _tied(transpose: bool, hidden: int = 4) -> Coder:
    torch.manual_seed(0)
    model = Coder(hidden if transpose else 4)
    ln.tie(model, "decode.weight", "encode.weight", transpose)
    return model


def _holds(model: nn.Module, transpose: bool) -> bool:
    model = getattr(model, "module", model)
    a, b = model.encode.weight, model.decode.weight
    if len(list(model.parameters())) != 1:
        return False
    if not transpose:
        return a is b
    return b.data_ptr() == a.data_ptr() and torch.equal(b, a.mT)


def _assigned(model: nn.Module) -> nn.Module:
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    if "decode.weight" in state:
        state["decode.weight"] = state["encode.weight"].clone()
    model.load_state_dict(state, assign=True)
    assert torch.equal(model.encode.weight, state["encode.weight"])
    return model


def _emptied(model: nn.Module) -> nn.Module:
    model = model.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        nn.init.normal_(model.encode.weight)
    return model


WAYS = {
    "nothing": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "to": lambda m: m.to(torch.float64),
    "half": lambda m: m.half().float(),
    "to_empty": _emptied,
    "to_empty of a copy": lambda m: _emptied(copy.deepcopy(m)),
    "load": lambda m: (m.load_state_dict(copy.deepcopy(m).state_dict()), m)[1],
    "assign": _assigned,
    "a wrapper's to_empty": lambda m: _emptied(nn.Sequential(m)[0]),
    "averaged": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_tie_survives(way, transpose) -> None:
    model = WAYS[way](_tied(transpose))
    assert _holds(model, transpose)


@pytest.mark.parametrize("transpose", [False, True])
def test_it_trains_as_the_formula_by_hand(transpose) -> None:
    model = _tied(transpose, hidden=3)
    w = model.encode.weight.detach().clone().requires_grad_()
    ours = torch.optim.AdamW(model.parameters(), lr=0.1)
    byhand = torch.optim.AdamW([w], lr=0.1)
    for _ in range(3):
        x = torch.randn(5, 4)
        hidden = torch.tanh(x @ w.T)
        (hidden @ (w if transpose else w.T)).square().mean().backward()
        model(x).square().mean().backward()
        for optimizer in (ours, byhand):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.encode.weight, w)
    assert len(ours.state) == 1


def test_every_name_of_the_tie_is_seen() -> None:
    (entry,) = entries(_tied(transpose=False))
    assert entry.names == ("encode.weight", "decode.weight")


@pytest.mark.parametrize("transpose", [False, True])
def test_a_checkpoint_holds_it_once(transpose, tmp_path) -> None:
    model = _tied(transpose)
    safetensors.torch.save_model(model, tmp_path / "a.safetensors")
    assert len(safetensors.torch.load_file(tmp_path / "a.safetensors")) == 1
    other = _tied(transpose)
    with torch.no_grad():
        other.encode.weight.zero_()
    safetensors.torch.load_model(other, tmp_path / "a.safetensors")
    assert torch.equal(other.encode.weight, model.encode.weight)
    ln.save_checkpoint(tmp_path / "b.safetensors", model, torch.optim.SGD(model.parameters()))
    kept = [k for k in safetensors.torch.load_file(tmp_path / "b.safetensors") if "weight" in k]
    assert kept == ["encode.weight"]
    ln.load_checkpoint(tmp_path / "b.safetensors", other)
    assert _holds(other, transpose)


@pytest.mark.parametrize("transpose", [False, True])
def test_a_file_may_name_either_side_or_both_with_one_value(transpose) -> None:
    value = torch.randn(4, 4)
    seen = value.mT if transpose else value
    for options in ({"strict": False}, {"strict": False, "assign": True}):
        for state in (
            {"encode.weight": value},
            {"decode.weight": seen},
            {"encode.weight": value, "decode.weight": seen.clone()},
        ):
            model = _tied(transpose)
            model.load_state_dict(state, **options)
            assert torch.equal(model.encode.weight, value)
            assert _holds(model, transpose)


@pytest.mark.parametrize("transpose", [False, True])
def test_two_different_values_are_refused_with_both_names(transpose) -> None:
    model = _tied(transpose)
    state = {"encode.weight": torch.zeros(4, 4), "decode.weight": torch.ones(4, 4)}
    with pytest.raises(RuntimeError, match=r"two different values(.|\n)*encode.weight, decode"):
        model.load_state_dict(state)


def test_a_tie_is_seen_through_a_wrapper_that_loads() -> None:
    outer = nn.Sequential(_tied(transpose=False))
    value = torch.randn(4, 4)
    outer.load_state_dict({"0.decode.weight": value}, strict=False)
    assert torch.equal(outer[0].encode.weight, value)


@pytest.mark.parametrize("transpose", [False, True])
def test_untie_gives_a_parameter_of_its_own(transpose) -> None:
    model = _tied(transpose)
    value = model.decode.weight.detach().clone()
    param = ln.untie(model, "decode.weight")
    assert param is model.decode.weight
    assert type(model.decode) is nn.Linear
    assert torch.equal(param, value)
    assert len(list(model.parameters())) == 2
    assert copy.deepcopy(model).decode.weight is not model.encode.weight
    model = model.to("meta").to_empty(device="cpu")
    assert len(list(model.parameters())) == 2
    with pytest.raises(ConstraintError, match="nothing is shared"):
        ln.untie(model, "decode.weight")


def test_untie_parts_what_was_shared_by_hand() -> None:
    model = Coder()
    model.decode.weight = model.encode.weight
    ln.untie(model, "encode.weight")
    assert len(list(model.parameters())) == 2


def test_tying_again_moves_the_tie() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(3)])
    ln.tie(model, "2.weight", "0.weight")
    ln.tie(model, "2.weight", "1.weight")
    assert model[2].weight is model[1].weight
    model = model.to("meta").to_empty(device="cpu")
    assert model[2].weight is model[1].weight
    assert model[0].weight is not model[1].weight


def test_the_old_target_is_taken_out_of_the_optimizer() -> None:
    model = Coder()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    ln.tie(model, "decode.weight", "encode.weight", optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert group["params"] == [model.encode.weight]
    assert group["param_names"] == ["encode.weight"]
    assert set(optimizer.state) == {model.encode.weight}


def test_an_optimizer_of_the_target_alone_gets_the_shared_one() -> None:
    model = Coder()
    optimizer = torch.optim.SGD([model.decode.weight], lr=0.1)
    ln.tie(model, "decode.weight", "encode.weight", optimizer=optimizer)
    assert optimizer.param_groups[0]["params"][0] is model.encode.weight


@pytest.mark.parametrize("transpose", [False, True])
def test_it_compiles_without_a_graph_break(transpose) -> None:
    model = _tied(transpose)
    x = torch.randn(2, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        model.encode.weight.add_(1)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_transposed_target_is_read_only_and_prints_as_before() -> None:
    model = _tied(transpose=True)
    assert repr(model) == repr(Coder())
    assert isinstance(model.decode, nn.Linear)
    assert "decode.weight" not in model.state_dict()
    with pytest.raises(ConstraintError, match="is the transpose of another"):
        model.decode.weight = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("target", "source", "transpose", "error", "message"),
    [
        ("nothing", "encode.weight", False, SelectionError, "picks no parameter"),
        ("decode.weight", "encode.wieght", False, SelectionError, "encode.weight"),
        ("decode.weight", "encode.weight", False, ShapeError, r"shape \(3, 4\)"),
        ("bias", "encode.weight", True, ShapeError, "cannot be one"),
        ("encode.weight", "bias", True, ShapeError, "only matrices"),
        ("encode.weight", "encode.weight", True, ConstraintError, "its own transpose"),
    ],
)
def test_what_does_not_fit_is_refused(target, source, transpose, error, message) -> None:
    model = Coder(hidden=3)
    model.encode = nn.Linear(4, 3 if target != source else 4, bias=False)
    if target == source:
        model.encode = nn.Linear(4, 4, bias=False)
    model.bias = nn.Parameter(torch.zeros(4))
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        ln.tie(model, target, source, transpose)
    assert list(model.state_dict()) == keys


def test_a_shape_that_fits_transposed_says_so() -> None:
    model = Coder(hidden=3)
    with pytest.raises(ShapeError) as caught:
        ln.tie(model, "decode.weight", "encode.weight")
    exec(caught.value.mend, {"ln": ln, "model": model})
    assert _holds(model, transpose=True)


def test_tying_what_is_constrained_constrains_the_shared_one() -> None:
    model = Coder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ln.constrain(model, "decode.weight", ln.sets.Sphere(), optimizer=optimizer)
    ln.tie(model, "decode.weight", "encode.weight", optimizer=optimizer)
    assert ln.violation(model) == {"encode.weight": pytest.approx(0, abs=1e-6)}
    model.encode.weight.grad = torch.randn(4, 4)
    optimizer.step()
    assert ln.violation(model)["encode.weight"] <= 1e-6


def test_one_side_of_a_tie_cannot_be_constrained_alone() -> None:
    for transpose in (False, True):
        model = _tied(transpose)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ConstraintError, match=r"decode.weight(.|\n)*encode.weight|encode"):
            ln.constrain(model, "decode.weight", ln.sets.Sphere(), optimizer=optimizer)
    ln.constrain(model, "encode.weight", ln.sets.Orthogonal(), optimizer=optimizer)
    assert ln.sets.Orthogonal().contains(model.decode.weight.detach())


def test_two_constraints_on_one_tie_are_refused() -> None:
    model = Coder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ln.constrain(model, "encode.weight", ln.sets.Sphere(), optimizer=optimizer)
    ln.constrain(model, "decode.weight", ln.sets.Ball(), optimizer=optimizer)
    with pytest.raises(ConstraintError, match=r"Ball(.|\n)*Sphere"):
        ln.tie(model, "decode.weight", "encode.weight")


def test_a_parametrized_side_is_refused() -> None:
    model = Coder()
    ln.constrain(model, "encode.weight", ln.sets.Skew(), how="parametrize")
    with pytest.raises(ConstraintError, match="parametrized"):
        ln.tie(model, "decode.weight", "encode.parametrizations.weight.original")


def test_a_transposed_target_follows_a_parametrized_source() -> None:
    model = _tied(transpose=True)
    ln.constrain(model, "encode.weight", ln.sets.Orthogonal(), how="parametrize")
    assert torch.equal(model.decode.weight, model.encode.weight.mT)
    model(torch.randn(2, 4)).sum().backward()
    assert model.encode.parametrizations.weight.original.grad is not None


@pytest.mark.parametrize("transpose", [False, True])
def test_a_tie_that_is_sharded_in_two_groups_is_found_before_it_raises(transpose) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def codes(*groups: list[str]) -> list[str]:
        model = Coder()
        ln.tie(model, "decode.weight", "encode.weight", transpose)
        for group in groups:
            fully_shard([getattr(model, name) for name in group], mesh=mesh)
        report = ln.audit(fully_shard(model, mesh=mesh))
        assert all(f.where == ["encode.weight", "decode.weight"] for f in report.findings)
        return report.codes

    with one_process_group():
        mesh = init_device_mesh("cpu", (1,))
        assert "LRN906" in codes(["encode"], ["decode"])
        assert "LRN906" not in codes(["encode", "decode"])
        assert "LRN906" not in codes()
