"""The enforcer: batched like one by one, idempotent, calm about bad values, lazy where asked."""

import importlib
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import learnables as ln
from learnables._native import lengths, orthonormal
from learnables.errors import ConstraintError, LearnablesWarning
from learnables.sets.apply import Enforcer, enforce, enforcer_of
from learnables.sets.batch import Group, Kept, grouped
from learnables.sets.constraint import Constraint


def _kept(*params: torch.Tensor, of=None, **options) -> list[Kept]:
    constraint = Constraint(of or ln.sets.Orthogonal(), **options)
    return [Kept(f"w{i}", nn.Parameter(p), constraint) for i, p in enumerate(params)]


def _near(*shape: int, size: float = 1e-2) -> torch.Tensor:
    return ln.sets.Orthogonal().project(torch.randn(shape)) + size * torch.randn(shape)


@pytest.mark.parametrize(
    "of",
    [
        ln.sets.Orthogonal(),
        ln.sets.Sphere(),
        ln.sets.Ball(0.3),
        ln.sets.Simplex(),
        ln.sets.NonNegative(),
        ln.sets.SpectralBall(0.9),
        ln.sets.Monotone(),
    ],
    ids=repr,
)
def test_together_is_the_same_as_one_by_one(of) -> None:
    torch.manual_seed(0)
    shapes = [(4, 4), (4, 4), (3, 5), (5, 3), (2, 4, 4), (4, 4)]
    kept = _kept(*[_near(*shape) for shape in shapes], of=of)
    alone = [of.enforce(one.parameter.detach())[0] for one in kept]
    Enforcer(kept).project_()
    for one, wanted in zip(kept, alone, strict=True):
        torch.testing.assert_close(one.parameter.data, wanted, rtol=0, atol=1e-6)


def test_a_second_call_changes_next_to_nothing() -> None:
    torch.manual_seed(0)
    for of in (ln.sets.Orthogonal(), ln.sets.Sphere(), ln.sets.Simplex(), ln.sets.Ball()):
        kept = _kept(_near(8, 8), _near(8, 8), of=of)
        enforcer = Enforcer(kept)
        enforcer.project_()
        once = [one.parameter.detach().clone() for one in kept]
        for _ in range(10):
            enforcer.project_()
        for one, before in zip(kept, once, strict=True):
            torch.testing.assert_close(one.parameter.data, before, rtol=0, atol=1e-6)


def test_a_nan_matrix_is_named_once_and_the_others_are_held() -> None:
    torch.manual_seed(0)
    kept = _kept(_near(6, 6), _near(6, 6), _near(2, 6, 6))
    kept[1].parameter.data[0, 0] = math.nan
    kept[2].parameter.data[1] = 0
    before = kept[1].parameter.detach().clone()
    enforcer = Enforcer(kept)
    with pytest.warns(LearnablesWarning) as caught:
        enforcer.project_()
    assert sorted(str(w.message).split("where: ")[1].split()[0] for w in caught) == ["w1", "w2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enforcer.project_()
    torch.testing.assert_close(kept[1].parameter.data, before, equal_nan=True)
    assert ln.sets.Orthogonal().violation(kept[0].parameter.data) <= 1e-5
    assert ln.sets.Orthogonal().violation(kept[2].parameter.data[0]) <= 1e-5
    said = {status.name: status for status in enforcer.status()}
    assert (said["w0"].nonfinite, said["w1"].nonfinite) == ((), (0,))
    assert said["w2"].degenerate == (1,)


def test_a_lazy_constraint_is_enforced_only_above_its_tolerance() -> None:
    torch.manual_seed(0)
    kept = _kept(_near(32, 32, size=0.0), lazy=1e-2)
    enforcer = Enforcer(kept)
    enforcer.project_()
    (status,) = enforcer.status()
    assert (status.enforced, status.skipped) == (0, 1)
    kept[0].parameter.data += 1e-4 * torch.randn(32, 32)
    enforcer.project_()
    assert enforcer.status()[0].skipped == 2
    kept[0].parameter.data += 1e-2 * torch.randn(32, 32)
    enforcer.project_()
    assert enforcer.status()[0].enforced == 1
    assert ln.sets.Orthogonal().violation(kept[0].parameter.data) <= 1e-5


def test_the_estimate_is_the_defect_on_average() -> None:
    torch.manual_seed(0)
    of, w, generator = ln.sets.Orthogonal(), _near(3, 20, 12), torch.Generator().manual_seed(0)
    squares = torch.stack([of.estimate(w, generator).square() for _ in range(500)])
    torch.testing.assert_close(squares.mean(0).sqrt(), of.violation(w), rtol=0.1, atol=0)


def test_tangent_mode_takes_the_part_across_out_of_the_gradient() -> None:
    torch.manual_seed(0)
    kept = _kept(_near(5, 3, size=0.0), _near(5, 3, size=0.0), how="tangent")
    for one in kept:
        one.parameter.grad = torch.randn(5, 3)
    wanted = [ln.sets.Orthogonal().tangent(o.parameter.data, o.parameter.grad) for o in kept]
    kept.append(_kept(_near(5, 3), how="tangent")[0])  # has no gradient this time
    Enforcer(kept).before_step_()
    for one, g in zip(kept, wanted, strict=False):
        torch.testing.assert_close(one.parameter.grad, g)
    assert kept[2].parameter.grad is None


def test_momentum_is_kept_in_the_tangent_space() -> None:
    torch.manual_seed(0)
    for make in (
        lambda p: torch.optim.Adam(p, lr=0.05),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    ):
        model = nn.Linear(4, 4, bias=False)
        optimizer = make(model.parameters())
        ln.constrain(model, "weight", ln.sets.Orthogonal(), optimizer=optimizer, momentum=True)
        for _ in range(3):
            model.weight.grad = torch.randn(4, 4)
            optimizer.step()
        state = optimizer.state[model.weight]
        momentum = state.get("exp_avg", state.get("momentum_buffer"))
        across = model.weight.mT @ momentum
        torch.testing.assert_close(across, -across.mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_nothing(fused) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    ln.constrain(model, "weight", ln.sets.Orthogonal(), optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model.weight.detach().clone()
    scaler.scale(model(torch.randn(3, 4)).sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(model.weight.data, before, rtol=0, atol=1e-6)


def test_autocast_and_coarse_matrix_products_change_nothing() -> None:
    torch.manual_seed(0)
    w = _near(16, 16)
    plain, cast = _kept(w.clone()), _kept(w.clone())
    Enforcer(plain).project_()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            Enforcer(cast).project_()
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(plain[0].parameter.data, cast[0].parameter.data)


class _Declared(nn.Module):
    def __init__(self, constraint: object) -> None:
        super().__init__()
        self.w = ln.parameter(4, 4, init=nn.init.normal_, constraint=constraint)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


@pytest.mark.parametrize("how", ["project", "tangent", "parametrize"])
def test_what_is_declared_is_enforced_by_one_call(how) -> None:
    torch.manual_seed(0)
    model = _Declared(Constraint(ln.sets.Orthogonal(), how=how))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = enforce(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        assert ln.violation(model)["w"] <= 1e-5
    assert len(enforce(model, optimizer).attached) == 0  # not twice
    handle.remove()
    if how != "parametrize":
        assert not enforcer_of(optimizer).kept


def test_attach_enforces_what_is_declared_until_it_is_removed() -> None:
    torch.manual_seed(0)
    model = _Declared(ln.sets.Sphere())
    optimizer = torch.optim.SGD(ln.param_groups(model, lr=0.5))
    first = ln.attach(model, optimizer)
    second = ln.attach(model, optimizer)  # replaces the first
    first.remove()  # has nothing to take away any more
    assert id(model.w) in second.attached
    model.w.grad = torch.randn(4, 4)
    optimizer.step()
    assert ln.violation(model)["w"] <= 1e-6
    second.remove()
    optimizer.step()
    assert ln.violation(model)["w"] > 1e-3


def test_a_declared_parameter_that_no_optimizer_holds_is_an_error() -> None:
    model = _Declared(ln.sets.Ball())
    with pytest.raises(ConstraintError, match="in none of the optimizers"):
        enforce(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


def test_an_averaged_copy_is_projected() -> None:
    torch.manual_seed(0)
    model = _Declared(ln.sets.Orthogonal())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    enforce(model, optimizer)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(5):
        model.w.grad = torch.randn(4, 4)
        optimizer.step()
        average.update_parameters(model)
    assert ln.violation(average)["module.w"] > 1e-2
    ln.sets.project_(average)
    assert ln.violation(average)["module.w"] <= 1e-5


def test_nothing_is_left_on_the_optimizer_of_a_copy() -> None:
    import copy

    model = _Declared(ln.sets.Ball())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    enforce(model, optimizer)
    copied = copy.deepcopy(optimizer)
    assert enforcer_of(copied) is None
    assert not copied.state_dict()["state"]


VIEWED = [  # shape of the parameters, view, how many points each holds
    ((8, 8), None, 1),
    ((8, 3, 3, 3), "conv", 1),
    ((12, 4), "heads:3", 3),
    ((5, 8), "cols", 1),  # a view that cannot be written in place
    ((2, 6, 6), None, 2),
]


@pytest.mark.parametrize(("shape", "view", "points"), VIEWED, ids=str)
def test_the_kernel_and_torch_agree_through_any_view(shape, view, points, monkeypatch) -> None:
    torch.manual_seed(0)
    near = Constraint(ln.sets.Orthogonal(), view=view).project(torch.randn(shape))
    values = [near + 1e-2 * torch.randn(shape) for _ in range(3)]
    values[1][(0,) * len(shape)] = math.nan
    native, plain = (_kept(*[v.clone() for v in values], view=view) for _ in range(2))
    enforcer = Enforcer(native)
    with pytest.warns(LearnablesWarning, match="where: w1"):
        enforcer.project_()
    for kernel in (orthonormal, lengths):
        monkeypatch.setattr(kernel, "available", lambda: (False, "not built"))
    alone = Enforcer(plain)
    with pytest.warns(LearnablesWarning, match="where: w1"):
        alone.project_()
    assert enforcer.status() == alone.status()
    assert len(enforcer.status()[1].nonfinite) == 1
    assert sum(map(len, enforcer._groups[0].statuses())) == 3 * points
    for one, other in zip(native, plain, strict=True):
        torch.testing.assert_close(
            one.parameter.data, other.parameter.data, rtol=0, atol=2e-6, equal_nan=True
        )


@pytest.mark.parametrize(("shape", "view", "points"), VIEWED, ids=str)
def test_gradients_are_taken_to_the_tangent_space_through_any_view(
    shape, view, points, monkeypatch
) -> None:
    torch.manual_seed(0)
    constraint = Constraint(ln.sets.Orthogonal(), view=view)
    value, g = constraint.project(torch.randn(shape)), torch.randn(shape)
    wanted = constraint.back(
        constraint.set.tangent(constraint.points(value), constraint.points(g)), g.shape
    )
    for with_kernel in (True, False):
        if not with_kernel:
            monkeypatch.setattr(orthonormal, "available", lambda: (False, "not built"))
        kept = _kept(value.clone(), value.clone(), view=view, how="tangent")
        for one in kept:
            one.parameter.grad = g.clone()
        Enforcer(kept).before_step_()
        for one in kept:
            torch.testing.assert_close(one.parameter.grad, wanted, rtol=0, atol=1e-5)


@pytest.mark.skipif(not orthonormal.available()[0], reason=orthonormal.available()[1])
@pytest.mark.parametrize("of", [ln.sets.Orthogonal(), ln.sets.Sphere(), ln.sets.Ball()], ids=repr)
def test_the_kernel_writes_where_the_values_lie_and_copies_nothing(of) -> None:
    torch.manual_seed(0)
    enforcer = Enforcer(_kept(*[_near(16, 16) for _ in range(5)], of=of))
    enforcer.project_()
    with torch.profiler.profile() as seen:
        enforcer.project_()
    called = {event.key for event in seen.key_averages()}
    assert not called & {"aten::stack", "aten::cat", "aten::_foreach_copy_", "aten::copy_"}, called


class _Reads(TorchDispatchMode):
    """Counts what an accelerator would have to stop for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_to_cpu")
        if any(name in str(func) for name in waits):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "of",
    [
        ln.sets.Orthogonal(),
        ln.sets.Stiefel(),
        ln.sets.SpecialOrthogonal(),
        ln.sets.Sphere(),
        ln.sets.Ball(0.3),
        ln.sets.MinMaxNorm(0.5, 2.0),
        ln.sets.L1Ball(),
        ln.sets.LinfBall(),
        ln.sets.Simplex(),
        ln.sets.SumTo(),
        ln.sets.ZeroMean(),
        ln.sets.Monotone(),
        ln.sets.NonNegative(),
        ln.sets.Symmetric(),
        ln.sets.Skew(),
    ],
    ids=repr,
)
def test_on_an_accelerator_the_host_reads_nothing_in_the_hot_call(of, monkeypatch) -> None:
    torch.manual_seed(0)
    for module in ("base", "polar", "sphere", "ball", "simplex", "monotone", "l1_ball"):
        home = importlib.import_module(f"learnables.sets.{module}")
        if hasattr(home, "can_look"):  # what decides whether the host may look
            monkeypatch.setattr(home, "can_look", lambda x: False)
    monkeypatch.setattr("learnables.sets.batch.may_be_written", lambda x: False)
    group = Enforcer(_kept(_near(6, 6), _near(6, 6), _near(2, 6, 6), of=of))._groups
    with torch.no_grad(), _Reads() as reads:
        for one in group:
            one.project_()
            one.before_step_()
    assert not reads.seen
    with _Reads() as reads:  # and the counter counts
        bool((torch.ones(3) > 0).any())
    assert reads.seen


RAGGED = {
    "tall": [(8, 8), (12, 7), (2, 9, 5), (8, 8)],
    "wide": [(5, 9), (7, 8), (6, 9)],
}


@pytest.mark.parametrize("shapes", RAGGED.values(), ids=list(RAGGED))
@pytest.mark.parametrize("how", ["project", "tangent"])
def test_matrices_of_several_shapes_are_padded_to_one_and_stay_what_they_would_be(
    shapes, how
) -> None:
    torch.manual_seed(0)
    padded = _kept(*[_near(*shape) for shape in shapes], how=how)
    alone = [Kept(o.name, nn.Parameter(o.parameter.detach().clone()), o.constraint) for o in padded]
    for one, other in zip(padded, alone, strict=True):
        one.parameter.grad = torch.randn_like(one.parameter)
        other.parameter.grad = one.parameter.grad.clone()
    padded[-1].parameter.data[0, 0] = alone[-1].parameter.data[0, 0] = math.nan
    (group,) = grouped(padded, pad=True)
    each = [Group([one]) for one in alone]
    with torch.no_grad():
        for one in (group, *each):
            one.before_step_()
            one.project_()
    said = {one.name: codes for one, codes in zip(group.members, group.statuses(), strict=True)}
    assert said == {one.members[0].name: one.statuses()[0] for one in each}
    assert said[padded[-1].name] == [1]
    for one, other in zip(padded, alone, strict=True):
        for a, b in (
            (one.parameter.data, other.parameter.data),
            (one.parameter.grad, other.parameter.grad),
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6, equal_nan=True)


def test_what_padding_would_make_dear_is_not_padded() -> None:
    kept = _kept(torch.eye(64), *torch.eye(4).repeat(3, 1, 1), torch.eye(60), torch.eye(4, 5))
    names = [[one.name for one in group.members] for group in grouped(kept, pad=True)]
    assert names == [["w0", "w4"], ["w1", "w2", "w3"], ["w5"]]
    assert len(grouped(kept)) == 4  # on a CPU a call costs next to nothing


@pytest.mark.parametrize("how", ["project", "tangent"])
@pytest.mark.parametrize(
    "of", [ln.sets.Orthogonal(), ln.sets.Sphere(), ln.sets.Simplex(), ln.sets.Skew()], ids=repr
)
def test_a_whole_group_compiles_without_a_graph_break(of, how) -> None:
    torch.manual_seed(0)
    values, gradients = [_near(6, 6) for _ in range(3)], [torch.randn(6, 6) for _ in range(3)]
    results = []
    for compiled in (True, False):
        kept = _kept(*[v.clone() for v in values], of=of, how=how)
        for one, g in zip(kept, gradients, strict=True):
            one.parameter.grad = g.clone()
        group = Group(kept)

        def enforce_(group=group) -> None:
            group.before_step_()
            group.project_()

        torch._dynamo.reset()
        call = torch.compile(enforce_, fullgraph=True, backend="eager") if compiled else enforce_
        with torch.no_grad():
            call()
        results.append([(one.parameter.data, one.parameter.grad) for one in kept])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)
