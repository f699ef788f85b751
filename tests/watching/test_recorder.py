import math

import pytest
import torch
from torch import nn

import learnables as ln
from learnables.errors import LearnablesError, LearnablesWarning
from learnables.watching import AlarmRaised


def quadratic(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 8)).square().mean().backward()
        optimizer.step()


def make(**kwargs) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, **kwargs})


def test_looks_at_the_first_step_and_at_multiples(tmp_path):
    model, optimizer = make()
    with ln.watch(model, optimizer, every=4, to=tmp_path, budget=None) as watcher:
        quadratic(model, optimizer, 12)
    assert [o.step for o in watcher.run().observations] == [1, 4, 8, 12]


def test_records_what_a_slow_twin_sees(tmp_path):
    model, optimizer = make()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        quadratic(model, optimizer)
    (seen,) = watcher.run().observations
    for i, (name, p) in enumerate(model.named_parameters()):
        assert seen.names[i] == name
        change = p.detach() - before[name]
        for quantity, value in [("weight", before[name]), ("gradient", p.grad), ("update", change)]:
            rows = seen.rows[quantity]
            assert rows.norm[i] == pytest.approx(value.double().norm().item(), rel=1e-6)
            assert rows.moments["max"][i] == value.max().item()
            assert rows.moments["absmax"][i] == value.abs().max().item()
            assert rows.histogram[i].sum() == value.numel()
        assert seen.ratio[i] == pytest.approx(
            (change.norm() / before[name].norm()).item(), rel=1e-5
        )
        assert seen.columns["lr"][i] == pytest.approx(1e-2)


def test_update_includes_what_later_hooks_project(tmp_path):
    model, optimizer = make()
    before = model[0].weight.detach().clone()
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        optimizer.register_step_post_hook(lambda *_: model[0].weight.data.zero_())
        quadratic(model, optimizer)
    norm = watcher.run().series("update", "norm", "0.weight").values
    assert norm[0] == pytest.approx(before.norm().item(), rel=1e-6)


def test_a_closure_is_read_at_its_end(tmp_path):
    model, optimizer = make()

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 8)).square().mean()
        loss.backward()
        return loss

    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        optimizer.step(closure)
    (seen,) = watcher.run().observations
    assert seen.stage == "closure"
    assert seen.rows["gradient"].norm[0] == pytest.approx(model[0].weight.grad.norm().item(), 1e-6)


def test_optimizers_inside_backward_make_one_observation(tmp_path):
    model, _ = make()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    with ln.watch(model, optimizers, every=2, to=tmp_path, budget=None) as watcher:
        for _ in range(4):
            model(torch.ones(4, 8)).square().mean().backward()
    seen = watcher.run().observations
    assert [o.step for o in seen] == [1, 2, 4]
    assert all(o.rows["gradient"].present.all() and o.rows["update"].present.all() for o in seen)


def test_a_fused_overflow_is_marked_and_has_no_update(tmp_path):
    model, optimizer = make(fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        for factor in (1.0, math.inf):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(4, 8)).square().mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    first, second = watcher.run().observations
    assert (first.skipped, second.skipped) == (False, True)
    assert first.scale == 1024
    assert "update" not in second.rows
    assert not watcher.alarms


def test_failing_ends_the_watch_and_not_the_training(tmp_path):
    def train(watched: bool):
        model, optimizer = make()
        watcher = (
            ln.watch(model, optimizer, every=1, to=tmp_path / "run", budget=None)
            if watched
            else None
        )
        quadratic(model, optimizer)
        if watcher:
            watcher.path.rename(tmp_path / "elsewhere.db")
            with pytest.warns(LearnablesWarning, match="watching has failed"):
                quadratic(model, optimizer)
        else:
            quadratic(model, optimizer)
        quadratic(model, optimizer, 3)
        return [p.detach().clone() for p in model.parameters()]

    torch.testing.assert_close(train(True), train(False), rtol=0, atol=0)


def test_stop_raises_after_the_first_non_finite_value(tmp_path):
    model, optimizer = make()
    with ln.watch(model, optimizer, every=1, to=tmp_path, on_alarm="stop"):
        model(torch.ones(4, 8)).square().mean().backward()
        model[2].bias.grad.fill_(math.nan)
        with pytest.raises(AlarmRaised, match=r"2\.bias, step 1"):
            optimizer.step()


def test_an_optimizer_without_hooks_is_refused():
    with pytest.raises(LearnablesError, match="cannot be seen"):
        ln.watch(nn.Linear(1, 1), [object()], to=None)
