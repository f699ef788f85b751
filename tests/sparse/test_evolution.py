import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import learnables as ln
import learnables.notes
from learnables.errors import LayoutError, SelectionError
from learnables.sparse import SET, Prune, RigL, evolve


def a_model(density=0.25):
    return nn.Sequential(
        ln.nn.BlockSparseLinear(32, 32, block=8, density=density),
        nn.Tanh(),
        ln.nn.BlockSparseLinear(32, 16, block=8, density=density),
    )


def steps(model, optimizer, number, micro=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = nn.Linear(32, 16).requires_grad_(False)
    for _ in range(number):
        optimizer.zero_grad()
        for _ in range(micro):
            x = torch.randn(16, 32, generator=generator)
            (model(x) - target(x)).square().mean().backward()
        optimizer.step()


class Snapshots:
    """Weights, state and layouts as each optimizer step left them, before anything evolves."""

    def __init__(self, model, optimizer):
        self.layers = {name: m for name, m in model.named_modules() if hasattr(m, "rewire")}
        self.optimizer = optimizer
        optimizer.register_step_post_hook(self.take)

    def take(self, *_):
        self.taken = {
            name: (
                layer.layout,
                layer.weight,
                layer.weight.detach().clone(),
                {k: v.clone() for k, v in self.optimizer.state[layer.weight].items()},
            )
            for name, layer in self.layers.items()
        }


@pytest.mark.parametrize("rule", [SET(1.0), RigL(1.0), Prune(0.1)], ids=repr)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_blocks_that_stay_keep_value_and_state_and_new_ones_start_at_zero(rule, scope) -> None:
    torch.manual_seed(0)
    model = a_model(density=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)
    snapshots = Snapshots(model, optimizer)
    evolution = evolve(model, optimizer, rule, every=4, until=8, scope=scope)
    steps(model, optimizer, 3)
    assert not evolution.history
    steps(model, optimizer, 1)
    assert {change.step for change in evolution.history} == {4}
    for name, (layout, param, values, state) in snapshots.taken.items():
        layer, old = snapshots.layers[name], layout.mask.nonzero().tolist()
        assert layer.weight is param
        assert tuple(param.shape) == layer.layout.weight_shape
        now = {k: v for k, v in optimizer.state[param].items() if v.ndim == 3}
        assert set(now) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        for at, place in enumerate(layer.layout.mask.nonzero().tolist()):
            pairs = [(param[at], values), *((now[k][at], state[k]) for k in now)]
            for after, before in pairs:
                wanted = before[old.index(place)] if place in old else torch.zeros(8, 8)
                assert torch.equal(after, wanted)
        assert torch.equal(optimizer.state[param]["step"], state["step"])
    steps(model, optimizer, 8)
    assert {change.step for change in evolution.history} <= {4, 8}
    torch.testing.assert_close(
        model[0](torch.eye(32)),
        nn.functional.linear(torch.eye(32), model[0].dense(), model[0].bias),
    )


OPTIMIZERS = {
    "SGD": {"momentum": 0.9},
    "Adam": {},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adagrad": {},
    "Adadelta": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "ASGD": {},
    "Adafactor": {},  # whose moments are factors: a row and a column for each block
}


@pytest.mark.parametrize("number", [6, 9])  # of blocks: as before, and more
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_moves_along_and_it_steps_on(name, number) -> None:
    layer = ln.nn.BlockSparseLinear(32, 40, block=(10, 8), density=6 / 16)
    optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.01, **OPTIMIZERS[name])
    for _ in range(3):
        layer(torch.randn(16, 32)).square().sum().backward()
        optimizer.step()
    state, old = optimizer.state[layer.weight], layer.layout.mask.nonzero().tolist()
    before = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor) and v.ndim}
    assert before
    mask = layer.layout.mask.roll(1, 1)
    mask.view(-1)[(~mask).flatten().nonzero()[: number - 6, 0]] = True
    layer.rewire(mask, optimizer)
    for k, v in before.items():
        assert state[k].shape == (number, *v.shape[1:])
        for at, place in enumerate(layer.layout.mask.nonzero().tolist()):
            wanted = v[old.index(place)] if place in old else torch.zeros_like(v[0])
            assert torch.equal(state[k][at], wanted)
    optimizer.zero_grad()
    layer(torch.randn(16, 32)).square().sum().backward()
    optimizer.step()
    assert layer.weight.isfinite().all()


def test_state_that_cannot_follow_is_refused_and_nothing_changes() -> None:
    layer = ln.nn.BlockSparseLinear(32, 32, block=8, density=0.25)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
    layer(torch.randn(16, 32)).square().sum().backward()
    optimizer.step()
    optimizer.state[layer.weight]["packed"] = torch.zeros(layer.weight.numel())
    before = copy.deepcopy(layer.state_dict())
    momentum = optimizer.state[layer.weight]["momentum_buffer"].clone()
    with pytest.raises(LayoutError, match=r"where: packed\s+found: shape \(256,\)"):
        layer.rewire(layer.layout.mask.roll(1, 1), optimizer)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(optimizer.state[layer.weight]["momentum_buffer"], momentum)


def test_growing_by_one_block_changes_nothing_else_to_the_bit() -> None:
    layer = ln.nn.BlockSparseLinear(64, 48, block=16, density=0.4)
    optimizer = torch.optim.AdamW(layer.parameters())
    x = torch.randn(100, 64)
    layer(x).square().sum().backward()
    optimizer.step()
    before, grad, y = copy.deepcopy(layer), layer.weight.grad.clone(), layer(x)
    mask = layer.layout.mask.clone()
    place = (~mask).nonzero()[0]
    mask[tuple(place)] = True
    layer.rewire(mask, optimizer)
    at = layer.layout.mask.nonzero().tolist().index(place.tolist())
    rest = [i for i in range(layer.layout.num_blocks) if i != at]
    assert torch.equal(layer.weight[rest], before.weight)
    assert torch.equal(layer.weight.grad[rest], grad)
    assert not layer.weight[at].any()
    assert torch.equal(layer(x), y)
    assert optimizer.state[layer.weight]["exp_avg"].shape == layer.weight.shape
    layer(x).square().sum().backward()
    optimizer.step()


def test_the_gradient_of_all_blocks_is_the_dense_one_over_micro_batches() -> None:
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    evolution = evolve(model, optimizer, RigL(), every=3)
    layer, dense = model[0], model[0].dense().detach().requires_grad_()
    steps(model, optimizer, 2)
    assert not evolution._gradients
    x, target = torch.randn(2, 16, 32), torch.randn(2, 16, 16)
    for micro in range(2):
        (model(x[micro]) - target[micro]).square().mean().backward()
        hidden = nn.functional.linear(x[micro], dense, layer.bias.detach()).tanh()
        (model[2](hidden) - target[micro]).square().mean().backward()
    torch.testing.assert_close(evolution._gradients["0"], dense.grad)
    optimizer.step()
    assert not evolution._gradients


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_is_checkpointed_counts_its_gradient_once(reentrant) -> None:
    layer = ln.nn.BlockSparseLinear(32, 16, block=8, density=0.25)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    evolution = evolve(layer, optimizer, RigL(), every=1)
    x = torch.randn(4, 32, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(evolution._gradients[""], torch.ones(16, 4) @ x.detach())


def test_a_gradient_that_is_not_finite_or_never_came_postpones_the_update() -> None:
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    evolution = evolve(model, optimizer, RigL(0.5), every=1)
    layout = model[0].layout
    model[0](torch.full((2, 32), float("inf"))).sum().backward()
    optimizer.step()
    assert model[0].layout == layout
    assert not evolution.history


def test_an_iteration_that_a_scaler_skips_leaves_nothing_behind() -> None:
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    evolution = evolve(model, optimizer, RigL(1.0), every=1)
    for size in (1e30, 1.0):  # the first overflows
        optimizer.zero_grad()
        scaler.scale((size * model(torch.randn(16, 32)).square()).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert evolution.steps == 1
    assert {change.step for change in evolution.history} == {1}


def test_it_finds_the_blocks_that_matter() -> None:
    """A target that is itself block-sparse: RigL ends on its blocks, from a random start."""
    torch.manual_seed(0)
    wanted = ln.sparse.random(8, 8, 0.25, generator=torch.Generator().manual_seed(5))
    teacher = ln.nn.BlockSparseLinear(64, 64, block=8, mask=wanted, bias=False)
    layer = ln.nn.BlockSparseLinear(64, 64, block=8, density=0.25, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    start = int((layer.layout.mask & wanted).sum())
    with evolve(layer, optimizer, RigL(0.5), every=20, until=300):
        for _ in range(300):
            x = torch.randn(64, 64)
            optimizer.zero_grad()
            (layer(x) - teacher(x)).square().mean().backward()
            optimizer.step()
    assert start < 8
    assert torch.equal(layer.layout.mask, wanted)


def test_a_restart_goes_on_as_if_nothing_had_happened() -> None:
    torch.manual_seed(0)
    model = a_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    evolution = evolve(model, optimizer, SET(0.5), every=3, seed=4)
    steps(model, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), evolution.state_dict()))
    steps(model, optimizer, 4, seed=1)
    other = a_model()
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    resumed = evolve(other, other_optimizer, SET(0.5), every=3, seed=9)
    resumed.load_state_dict(saved[2])
    torch.manual_seed(1)
    steps(other, other_optimizer, 4, seed=1)
    assert resumed.steps == evolution.steps == 8
    assert other[0].layout == model[0].layout
    assert resumed.history[-1] == evolution.history[-1]


def test_prune_follows_its_schedule_to_the_end() -> None:
    model = a_model(density=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with evolve(model, optimizer, Prune(0.25), every=2, until=8) as evolution:
        steps(model, optimizer, 12)
    assert model[0].density == model[2].density == 0.25
    densities = [change.density for change in evolution.history if change.layer == "0"]
    assert densities == sorted(densities, reverse=True)
    assert all(change.grown == 0 for change in evolution.history)
    assert optimizer.state[model[0].weight]["momentum_buffer"].shape == model[0].weight.shape


def test_notes_follow_the_blocks() -> None:
    layer = ln.nn.BlockSparseLinear(32, 32, block=8, density=0.25)
    ln.annotate(layer, "weight", weight_decay="init")
    initial, old = layer.weight.detach().clone(), layer.layout.mask.nonzero().tolist()
    mask = ln.sparse.banded(4, 4, 0.5)
    layer.rewire(mask)
    kept = ln.notes.note_of(layer, "weight").initial
    for at, place in enumerate(mask.nonzero().tolist()):
        wanted = initial[old.index(place)] if place in old else torch.zeros(8, 8)
        assert torch.equal(kept[at], wanted)
    layer.reset_parameters()
    assert not ln.init.report(layer).off


def test_what_cannot_evolve_is_refused() -> None:
    model = a_model()
    with pytest.raises(SelectionError, match="no block-sparse layer"):
        evolve(nn.Linear(3, 3), torch.optim.SGD([torch.zeros(1)], lr=0.1), SET())
    with pytest.raises(SelectionError, match=r"where: 0\.weight, 2\.weight"):
        evolve(model, torch.optim.SGD([torch.zeros(1)], lr=0.1), SET())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(LayoutError, match="every=0"):
        evolve(model, optimizer, SET(), every=0)
    assert not optimizer._optimizer_step_post_hooks
