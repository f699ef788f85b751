"""Enforcement on access: right gradients, free repeated access, no harm from decay or autocast."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import learnables as ln
from learnables.sets.parametrized import OnTheSet


def _layer(of=None, n: int = 6, k: int = 4, **options) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(k, n, bias=False)
    ln.constrain(layer, "weight", of or ln.sets.Orthogonal(), how="parametrize", **options)
    return layer


@pytest.mark.parametrize("of", [ln.sets.Orthogonal(), ln.sets.Sphere(), ln.sets.SumTo()], ids=repr)
def test_the_gradient_is_that_of_the_exact_projection(of) -> None:
    layer = _layer(of).double()
    original = layer.parametrizations.weight.original
    target = torch.randn(6, 4, dtype=torch.float64)
    (layer.weight - target).square().sum().backward()
    exact = original.detach().clone().requires_grad_()
    (of.project(exact) - target).square().sum().backward()
    torch.testing.assert_close(original.grad, exact.grad, rtol=1e-6, atol=1e-8)


def test_repeated_access_is_free_and_a_change_is_seen(monkeypatch) -> None:
    layer = _layer()
    calls = []
    for name in ("enforce", "enforce_"):  # whichever this machine takes
        plain = getattr(ln.sets.Orthogonal, name)
        counted = lambda *args, plain=plain: (calls.append(1), plain(*args))[1]  # noqa: E731
        monkeypatch.setattr(ln.sets.Orthogonal, name, counted)
    _ = layer.weight
    calls.clear()
    (layer.weight.sum() + layer.weight.square().sum()).backward()
    layer.weight.sum().backward()  # again, without a step in between
    assert not calls
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(1.1)
    _ = layer.weight
    assert calls


def test_weight_decay_does_no_harm_where_torch_loses_the_weight() -> None:
    theirs = nn.utils.parametrizations.orthogonal(nn.Linear(20, 40, bias=False))
    ours = _layer(n=40, k=20)
    for layer in (theirs, ours):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.randn(8, 20)).square().mean().backward()
            optimizer.step()
    assert theirs.weight.abs().max() == 0
    assert ln.violation(ours)["weight"] <= 1e-5


def test_autocast_keeps_the_weight_exact_and_its_dtype() -> None:
    layer = _layer()
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = layer.weight
    assert weight.dtype == torch.float32
    assert ln.sets.Orthogonal().violation(weight.detach()) <= 1e-5


def test_assigning_projects() -> None:
    layer = _layer()
    value = torch.randn(6, 4)
    layer.weight = value
    torch.testing.assert_close(layer.weight.data, ln.sets.Orthogonal().project(value))


def test_a_copy_and_a_state_dict_carry_the_weight() -> None:
    layer = _layer()
    copied = copy.deepcopy(layer)
    assert torch.equal(copied.weight, layer.weight)
    assert (
        copied.parametrizations.weight[0].constraint == layer.parametrizations.weight[0].constraint
    )
    other = _layer(ln.sets.Orthogonal())
    with torch.no_grad():
        other.parametrizations.weight.original.normal_()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.weight, layer.weight)


def test_bake_leaves_the_same_parameter_with_a_plain_key() -> None:
    layer = _layer()
    param, value = layer.parametrizations.weight.original, layer.weight.detach().clone()
    assert ln.sets.bake(layer) is layer
    assert layer.weight is param
    assert torch.equal(layer.weight, value)
    assert list(layer.state_dict()) == ["weight"]
    assert not parametrize.is_parametrized(layer)


def test_the_policy_goes_with_the_parameter() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = ln.parameter(4, 4, weight_decay=False, init=nn.init.normal_)

    model = Net()
    ln.constrain(model, "w", ln.sets.Skew(), how="parametrize")
    from learnables.entries import entries

    (entry,) = entries(model)
    assert entry.places[0].note.get("weight_decay") is False


def test_a_nan_is_passed_on_instead_of_raised() -> None:
    layer = _layer()
    with torch.no_grad():
        layer.parametrizations.weight.original[0, 0] = math.nan
    assert layer.weight.isnan().any()


# Dynamo itself makes an instance of the autograd function while it traces.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_without_a_graph_break(backend) -> None:
    layer = _layer()
    plain = copy.deepcopy(layer)
    for one in (layer, plain):
        with torch.no_grad():
            one.parametrizations.weight.original.add_(0.01 * torch.arange(4.0))
    x = torch.randn(3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    compiled(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(
        layer.parametrizations.weight.original.grad,
        plain.parametrizations.weight.original.grad,
        rtol=1e-4,
        atol=1e-5,
    )
    assert ln.violation(layer)["weight"] <= 1e-5


def test_two_uses_in_one_forward_add_their_gradients() -> None:
    layer = _layer(n=4, k=4)
    x = torch.randn(2, 4)
    layer(layer(x)).sum().backward()
    both = layer.parametrizations.weight.original.grad.clone()
    w = layer.weight.detach().clone().requires_grad_()
    (x @ w.T @ w.T).sum().backward()
    wanted = ln.sets.Orthogonal().tangent(w.detach(), w.grad)
    torch.testing.assert_close(both, wanted, rtol=1e-4, atol=1e-5)


def test_it_prints_its_constraint() -> None:
    assert "Orthogonal()" in repr(_layer())
    assert isinstance(_layer().parametrizations.weight[0], OnTheSet)


def test_a_lazy_weight_is_projected_only_above_its_tolerance() -> None:
    layer = _layer(n=32, k=32, lazy=1e-2)
    ours, original = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    _ = layer.weight
    start = ours.skipped
    with torch.no_grad():
        original.add_(torch.randn(32, 32), alpha=1e-5)
    before = original.detach().clone()
    assert torch.equal(layer.weight, before)  # near enough: left as it is
    assert (ours.enforced, ours.skipped) == (0, start + 1)
    with torch.no_grad():
        original.add_(torch.randn(32, 32), alpha=1e-2)
    assert ln.sets.Orthogonal().violation(layer.weight.detach()) <= 1e-5
    assert ours.enforced == 1
