"""`ln.constrain` on real models and optimizers: held, refused, released, measured."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import learnables as ln
from learnables.errors import ConstraintError, LearnablesWarning, SelectionError, ShapeError
from learnables.sets.apply import enforcer_of

OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.05),
    lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    lambda p: torch.optim.Adam(p, lr=0.05, foreach=True),
]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("how", ["project", "tangent", "parametrize"])
@pytest.mark.parametrize(
    "of", [ln.sets.Orthogonal(), ln.sets.Sphere(), ln.sets.Ball(0.5), ln.sets.Simplex()], ids=repr
)
def test_a_constraint_holds_after_every_step(make, how, of) -> None:
    model = _model()
    optimizer = make(model.parameters())
    hooked = None if how == "parametrize" else optimizer
    ln.constrain(model, "*.weight", of, how=how, optimizer=hooked)
    assert set(ln.violation(model)) == {"0.weight", "2.weight", "4.weight"}
    before = model[2].weight.detach().clone()
    for _ in range(4):
        assert max(ln.violation(model).values()) <= 1e-5
        _train(model, optimizer, steps=1)
    assert max(ln.violation(model).values()) <= 1e-5
    assert not torch.equal(model[2].weight, before)


def test_parameters_and_keys_stay_what_they_are() -> None:
    model = _model()
    params, keys = list(model.parameters()), list(model.state_dict())
    optimizer = torch.optim.Adam(params)
    ln.constrain(model, "*.weight", ln.sets.Orthogonal(), optimizer=optimizer)
    _train(model, optimizer)
    assert [id(p) for p in model.parameters()] == [id(p) for p in params]
    assert list(model.state_dict()) == keys
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_the_value_is_projected_and_what_lies_inside_is_left_bit_by_bit() -> None:
    model = nn.Linear(4, 2, bias=False)
    model.weight.data = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.1, 0.2, 0.0, 0.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ln.constrain(model, "weight", ln.sets.Ball(), optimizer=optimizer)
    assert model.weight[0].tolist() == pytest.approx([0.6, 0.8, 0.0, 0.0])
    assert torch.equal(model.weight[1], torch.tensor([0.1, 0.2, 0.0, 0.0]))


def test_the_constraint_is_written_down_where_others_look_for_it() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ln.constrain(model, "0.weight", ln.sets.Sphere(), "tangent", optimizer, view="cols")
    from learnables.entries import entries

    (note,) = [e.places[0].note for e in entries(model) if e.name == "0.weight"]
    said = note.get("constraint")
    assert (said.set, said.view, said.how) == (ln.sets.Sphere(), "cols", "tangent")
    assert __file__ in note.annotated[-1].at
    copied = copy.deepcopy(model)
    assert set(ln.violation(copied)) == {"0.weight"}


def test_columns_and_filters_are_what_the_view_says() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ln.constrain(model, "0.weight", ln.sets.Orthogonal(), optimizer=optimizer, view="conv")
    ln.constrain(model, "2.weight", ln.sets.Sphere(), optimizer=optimizer, view="cols")
    filters = model[0].weight.detach().flatten(1)
    torch.testing.assert_close(filters @ filters.T, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(model[2].weight.detach().norm(dim=0), torch.ones(8))


def test_without_an_optimizer_it_says_what_to_pass_and_typing_it_works() -> None:
    model = _model()
    with pytest.raises(ConstraintError) as caught:
        ln.constrain(model, "0.weight", ln.sets.Ball())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exec(caught.value.mend, {"ln": ln, "model": model, "optimizer": optimizer})
    assert ln.violation(model)["0.weight"] <= 1e-6
    assert enforcer_of(optimizer) is not None


def _with_nan() -> nn.Module:
    model = _model()
    model[0].weight.data[0, 0] = math.nan
    return model


def _tied() -> nn.Module:
    model = _model()
    model[2].weight = model[4].weight = nn.Parameter(torch.randn(4, 4))
    return model


def _integer() -> nn.Module:
    model = nn.Module()
    model.table = nn.Parameter(torch.zeros(3, 3, dtype=torch.int64), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("model", "selector", "of", "options", "error", "message"),
    [
        (_with_nan, "0.weight", ln.sets.Ball(), {}, ConstraintError, "1 of 36 entries are NaN"),
        (_tied, "2.weight", ln.sets.Ball(), {}, ConstraintError, "leaves out 4.weight"),
        (_integer, "table", ln.sets.Ball(), {}, ConstraintError, "where: table\n.*int64"),
        (_model, "nothing", ln.sets.Ball(), {}, SelectionError, "picks no parameter"),
        (_model, "0.bias", ln.sets.Orthogonal(), {}, ShapeError, "where: 0.bias"),
        (_model, "4.weight", ln.sets.Stiefel(), {"view": "cols"}, ShapeError, r"seen as \(4, 6\)"),
        (_model, "0.weight", ln.sets.Ball(), {"view": "heads:4"}, ShapeError, "4 divides"),
        (_model, "0.weight", ln.sets.Ball(), {"how": "hope"}, ConstraintError, "how='hope'"),
        (_model, "0.weight", ln.sets.Ball(), {"lazy": -1.0}, ConstraintError, "lazy > 0"),
        (_model, "0.weight", ln.sets.Ball(), {"lazy": 1e-12}, ConstraintError, "can store"),
        (_model, "0.weight", ln.sets.Ball, {}, ConstraintError, "an instance of ln.sets"),
    ],
)
def test_bad_input_is_refused_by_name_and_nothing_is_changed(
    model, selector, of, options, error, message
) -> None:
    model = model()
    params = [p for p in model.parameters() if p.requires_grad] or [nn.Parameter(torch.zeros(1))]
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([*model.parameters(), *params[:0]], lr=0.1)
    with pytest.raises(error, match=message):
        ln.constrain(model, selector, of, optimizer=optimizer, **options)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert ln.violation(model) == {}


def test_a_filter_needs_a_view() -> None:
    model = nn.Conv1d(4, 4, 3)
    with pytest.raises(ShapeError, match="which matrix"):
        ln.constrain(model, "weight", ln.sets.Orthogonal(), how="parametrize")


def test_another_optimizer_is_refused() -> None:
    model, other = _model(), torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ConstraintError, match="in 0 of 1 optimizers"):
        ln.constrain(model, "0.weight", ln.sets.Ball(), optimizer=other)


def test_a_second_constraint_is_refused_and_the_same_one_may_change_its_mode() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ln.constrain(model, "0.weight", ln.sets.Orthogonal(), optimizer=optimizer)
    with pytest.raises(ConstraintError, match=r"constrained already(.|\n)*Orthogonal\(\)"):
        ln.constrain(model, "0.weight", ln.sets.Ball(), optimizer=optimizer)
    ln.constrain(model, "0.weight", ln.sets.Orthogonal(), how="parametrize")
    assert not enforcer_of(optimizer).kept
    ln.constrain(model, "0.weight", ln.sets.Orthogonal(), "tangent", optimizer)
    assert [one.constraint.how for one in enforcer_of(optimizer).kept] == ["tangent"]
    _train(model, optimizer)
    assert ln.violation(model)["0.weight"] <= 1e-5


def test_unconstrain_leaves_the_value_and_lets_it_go() -> None:
    for how in ("project", "parametrize"):
        model = _model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        hooked = optimizer if how == "project" else None
        ln.constrain(model, "0.weight", ln.sets.Orthogonal(), how=how, optimizer=hooked)
        value = model[0].weight.detach().clone()
        ln.unconstrain(model, "0.weight")
        assert torch.equal(model[0].weight, value)
        assert ln.violation(model) == {}
        _train(model, optimizer)
        assert ln.sets.Orthogonal().violation(model[0].weight) > 1e-4
        with pytest.raises(ConstraintError, match="nothing here is constrained"):
            ln.unconstrain(model, "0.weight")


def test_a_declared_constraint_can_be_taken_back() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = ln.parameter(3, 3, constraint=ln.sets.Sphere())

    model = Net()
    assert set(ln.violation(model)) == {"w"}
    ln.unconstrain(model, "w")
    assert ln.violation(model) == {}


def test_what_a_set_does_to_the_size_is_left_out_of_weight_decay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fixed = ln.parameter(3, 3, constraint=ln.sets.Sphere())
            self.bounded = ln.parameter(3, 3, constraint=ln.sets.Ball())
            self.said = ln.parameter(3, 3, constraint=ln.sets.Sphere(), weight_decay=True)

    groups = ln.param_groups(Net(), lr=0.1, weight_decay=0.05)
    decays = {name: g["weight_decay"] for g in groups for name in g["param_names"]}
    assert decays == {"fixed": 0, "bounded": 0.05, "said": 0.05}


def test_constraining_what_was_annotated_is_one_statement() -> None:
    model = _model()
    ln.annotate(model, "0.weight", constraint=ln.sets.Ball(), lr_scale=0.5)
    optimizer = torch.optim.SGD(ln.param_groups(model, lr=0.1))
    ln.constrain(model, "0.weight", ln.sets.Ball(), "tangent", optimizer)
    assert ln.inventory(model)["0.weight"].constraint.how == "tangent"
    assert ln.inventory(model)["0.weight"].lr_scale == 0.5


def test_a_zero_or_deficient_value_is_completed_with_a_warning() -> None:
    model = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(model.weight)
    with pytest.warns(LearnablesWarning, match="many nearest points"):
        ln.constrain(model, "weight", ln.sets.Orthogonal(), how="parametrize")
    assert ln.violation(model)["weight"] <= 1e-6


def test_half_precision_says_its_floor_and_refuses_a_finer_tolerance() -> None:
    model = nn.Linear(64, 64, bias=False).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConstraintError, match=r"lazy ≥ 1.9e-02"):
        ln.constrain(model, "weight", ln.sets.Orthogonal(), optimizer=optimizer, lazy=1e-3)
    with pytest.warns(LearnablesWarning, match=r"≈ 1.9e-02"):
        ln.constrain(model, "weight", ln.sets.Orthogonal(), optimizer=optimizer)
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    assert model.weight.dtype == torch.bfloat16
    assert ln.violation(model)["weight"] <= 2.3e-2


def test_a_shared_parameter_is_constrained_by_all_its_names() -> None:
    model = _tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ln.constrain(model, ["2.weight", "4.weight"], ln.sets.Orthogonal(), optimizer=optimizer)
    ln.constrain(model, model[2].weight, ln.sets.Orthogonal(), optimizer=optimizer)
    assert len(enforcer_of(optimizer).kept) == 1
    assert ln.violation(model)["2.weight"] <= 1e-5
    with pytest.raises(ConstraintError, match="cannot be parametrized"):
        ln.constrain(model, model[2].weight, ln.sets.Orthogonal(), how="parametrize")


def test_a_checkpoint_goes_in_and_out_with_plain_keys() -> None:
    model = _model()
    optimizer = torch.optim.Adam(model.parameters())
    ln.constrain(model, "*.weight", ln.sets.Orthogonal(), optimizer=optimizer)
    _train(model, optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    plain = _model()
    plain.load_state_dict(saved["model"])
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("replace", ["to_empty", "assign"])
def test_it_follows_a_parameter_that_was_replaced(replace) -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ln.constrain(model, "0.weight", ln.sets.Sphere(), optimizer=optimizer)
    old = model[0].weight
    if replace == "assign":
        state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    else:
        model.to("meta")
        model.to_empty(device="cpu")
        with torch.no_grad():
            [nn.init.normal_(p) for p in model.parameters()]
    assert model[0].weight is not old
    optimizer.step()
    assert ln.violation(model)["0.weight"] <= 1e-6


def _one(value: torch.Tensor | nn.Parameter) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Module()
    model.w = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
    held = [model.w] if type(model.w) is nn.Parameter else [nn.Parameter(torch.zeros(1))]
    return model, torch.optim.SGD(held, lr=0.1)


TALL, SQUARE = "at least as many rows", "as many rows as"
NO_POINT = {
    "a number where vectors are meant": (torch.tensor(1.0), ln.sets.Sphere(), "at least 1"),
    "a number where matrices are meant": (torch.tensor(1.0), ln.sets.Orthogonal(), "at least 2"),
    "a wide matrix where a tall one is meant": (
        torch.ones(2, 5),
        ln.sets.Stiefel(),
        "as many rows",
    ),
    "an oblong matrix where a square one is meant": (
        torch.ones(2, 5),
        ln.sets.PSD(),
        "as many rows",
    ),
    "an empty point": (torch.ones(3, 0), ln.sets.Sphere(), "no empty dimension"),
}


@pytest.mark.parametrize(("value", "of", "wanted"), NO_POINT.values(), ids=list(NO_POINT))
def test_a_shape_without_a_point_is_refused_by_name_with_both_shapes(value, of, wanted) -> None:
    model, optimizer = _one(value)
    with pytest.raises(ShapeError) as caught:
        ln.constrain(model, "w", of, optimizer=optimizer)
    assert caught.value.where == "w"
    assert f"shape {tuple(value.shape)}" in caught.value.found
    assert wanted in caught.value.wanted
    assert ln.violation(model) == {}


def test_a_number_can_be_kept_where_numbers_are_points() -> None:
    model, optimizer = _one(torch.tensor(-2.0))
    ln.constrain(model, "w", ln.sets.Box(-1.0, 1.0), optimizer=optimizer)
    assert model.w.item() == -1.0
    model.w.grad = torch.tensor(-50.0)
    optimizer.step()
    assert model.w.item() == 1.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("of", [ln.sets.Orthogonal(), ln.sets.Sphere(), ln.sets.Box(-1.0, 1.0)])
def test_a_value_that_is_not_finite_is_refused_and_the_mend_works(of, bad) -> None:
    model, optimizer = _one(torch.eye(4))
    model.w.data[1, 2] = bad
    with pytest.raises(ConstraintError, match="1 of 16 entries") as caught:
        ln.constrain(model, "w", of, optimizer=optimizer)
    exec(caught.value.mend, {"nn": nn, "model": model})
    ln.constrain(model, "w", of, optimizer=optimizer)
    assert ln.violation(model)["w"] <= 1e-5


DEFICIENT = {
    "zero": torch.zeros(5, 4),
    "of rank 1": torch.outer(torch.arange(1.0, 6.0), torch.ones(4)),
    "with a zero column": torch.eye(5, 4) * torch.tensor([1.0, 1.0, 0.0, 1.0]),
}


@pytest.mark.parametrize("value", DEFICIENT.values(), ids=list(DEFICIENT))
def test_a_matrix_without_full_rank_is_completed_with_a_warning_that_names_it(value) -> None:
    model, optimizer = _one(value.clone())
    with pytest.warns(LearnablesWarning, match=r"where: w\n(.|\n)*1 of 1 points"):
        ln.constrain(model, "w", ln.sets.Orthogonal(), optimizer=optimizer)
    assert ln.violation(model)["w"] <= 1e-5


def test_a_complex_parameter_is_refused_where_it_has_no_meaning() -> None:
    model, optimizer = _one(torch.ones(3, 3, dtype=torch.complex64))
    with pytest.raises(ConstraintError, match=r"where: w\n(.|\n)*complex64"):
        ln.constrain(model, "w", ln.sets.Simplex(), optimizer=optimizer)


def test_a_lazy_parameter_is_refused_until_it_has_a_shape() -> None:
    model, optimizer = _one(nn.UninitializedParameter())
    with pytest.raises(ConstraintError, match="no value to constrain yet"):
        ln.constrain(model, "w", ln.sets.Ball(), optimizer=optimizer)


def test_a_parameter_of_another_model_is_not_found() -> None:
    model, optimizer = _one(torch.eye(3))
    other = nn.Parameter(torch.eye(3))
    with pytest.raises(SelectionError):
        ln.constrain(model, other, ln.sets.Ball(), optimizer=optimizer)
    assert torch.equal(other, torch.eye(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["project", "tangent", "parametrize"])
def test_half_precision_is_computed_in_fp32_and_only_rounded(dtype, how) -> None:
    torch.manual_seed(0)
    model, optimizer = _one(torch.randn(16, 16).to(dtype))
    exact = ln.sets.Orthogonal().project(model.w.detach().double())
    hooked = None if how == "parametrize" else optimizer
    with pytest.warns(LearnablesWarning, match="only roughly"):
        ln.constrain(model, "w", ln.sets.Orthogonal(), how=how, optimizer=hooked)
    assert model.w.dtype == dtype
    stored = model.w.detach()
    assert ln.violation(model)["w"] <= 1.2 * ln.sets.Orthogonal().floor(stored.shape, dtype)
    if how != "parametrize":  # whose first access projects the rounded value once more
        allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6
        assert ((stored.double() - exact).abs() <= allowed).all()
