import contextlib
import io
import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import learnables as ln
from learnables.watching import AlarmRaised, Run


class Model(nn.Module):
    """Two linear maps and a parameter of its own, so that every part of a name occurs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 16)
        self.second = nn.Linear(16, 4)
        self.shift = nn.Parameter(torch.full((4,), 0.1))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) + self.shift


def train(folder, model, optimizer, steps=12, before=None, after=None, every=1, **kwargs):
    with ln.watch(model, optimizer, every=every, to=folder, budget=None, **kwargs) as watcher:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if before:
                before(step)
            optimizer.step()
            if after:
                after(step)
    assert watcher.failed is None
    assert [str(a) for a in watcher.run().alarms] == [str(a) for a in watcher.alarms]
    for alarm in watcher.alarms:
        says_all_five_parts(alarm, model, optimizer)
    return watcher.alarms


def says_all_five_parts(alarm, model, optimizer):
    """And what it says to type can be typed, with the names that a reader has."""
    parts = alarm.parts()
    assert list(parts) == ["what", "where", "found", "wanted", "mend"]
    assert all(parts.values()), parts
    assert parts["where"].startswith(f"{alarm.name or 'the run'}, step {alarm.step}")
    said = str(alarm).splitlines()
    assert [line.split(":")[0].strip() for line in said[1:]] == list(parts)[1:]

    def step():
        optimizer.zero_grad()
        width = next(p for p in model.parameters() if p.ndim == 2).shape[1]
        loss = model(torch.randn(8, width)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    scope = {"ln": ln, "torch": torch, "model": model, "optimizer": optimizer, "step": step}
    with (
        contextlib.redirect_stdout(io.StringIO()),
        torch.autograd.set_detect_anomaly(False),  # put back afterwards
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # what was broken may still say so
        exec(alarm.mend, scope)


def adam(model, **kwargs):
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, **kwargs})


def test_a_healthy_training_raises_nothing(tmp_path):
    model = Model()
    assert train(tmp_path, model, adam(model), steps=60) == []


def test_dead_and_frozen_are_told_apart(tmp_path):
    model = Model()
    optimizer = adam(model)
    optimizer.register_step_post_hook(lambda *_: model.shift.data.fill_(0.1))
    model.second.bias.register_hook(torch.zeros_like)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    alarms = train(tmp_path, model, optimizer)
    assert {(a.kind, a.name) for a in alarms} == {("dead", "second.bias"), ("frozen", "shift")}


@pytest.mark.parametrize("when", [0, 4])
def test_what_is_frozen_on_purpose_is_not_dead_though_its_optimizer_holds_it(tmp_path, when):
    """As where the backbone is frozen and the optimizer was given ``model.parameters()``."""
    model = Model()
    optimizer = adam(model)
    model.first.requires_grad_(when > 0)

    def after(step):
        if step == when:
            model.first.requires_grad_(False)

    assert train(tmp_path, model, optimizer, steps=20, after=after) == []


def test_updates_lost_in_bfloat16_are_seen(tmp_path):
    model = Model()
    model.shift.data = torch.full((4,), 100.0, dtype=torch.bfloat16)
    alarms = train(tmp_path, model, adam(model))
    assert ("rounding", "shift") in {(a.kind, a.name) for a in alarms}


def test_a_spike_between_two_looks_is_dated(tmp_path):
    model = Model()

    def before(step):
        if step == 33:
            for p in model.parameters():
                p.grad.mul_(1e4)

    alarms = train(tmp_path, model, adam(model), steps=40, every=20, before=before)
    assert [(a.kind, a.step) for a in alarms] == [("spike", 33)]


def test_a_mask_that_fills_up_is_seen_and_an_identity_is_not(tmp_path):
    model = Model()
    model.colour = nn.Parameter(torch.eye(4))
    mask = torch.rand(16, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    model.first.weight.data.mul_(mask)
    forward = model.forward
    model.forward = lambda x: forward(x @ model.colour)

    def before(step):
        if step < 8:
            model.first.weight.grad.mul_(mask)

    alarms = train(tmp_path, model, adam(model, weight_decay=0.0), before=before)
    assert [(a.kind, a.name) for a in alarms] == [("mask-drift", "first.weight")]


def test_a_broken_tie_is_named_with_both_names(tmp_path):
    model = Model()
    model.alias = model.shift

    def after(step):
        if step == 3:
            model.alias = nn.Parameter(model.shift.detach().clone())

    (alarm, *_) = train(tmp_path, model, adam(model), steps=5, after=after)
    assert (alarm.kind, alarm.name) == ("untied", "shift")
    assert "'alias'" in alarm.found


def test_a_value_that_leaves_its_set_is_seen(tmp_path):
    model = Model()
    model.mix = ln.parameter(torch.tensor([0.5, 0.5]), constraint=ln.sets.Simplex())
    model.second.register_forward_hook(lambda m, i, out: out * model.mix.sum())
    alarms = train(tmp_path, model, adam(model, lr=0.1), steps=6)
    assert ("outside", "mix") in {(a.kind, a.name) for a in alarms}


def test_a_scaler_that_skips_much_is_seen(tmp_path):
    model = Model()
    optimizer = adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=10**6)
    with ln.watch(model, optimizer, every=10, to=tmp_path, budget=None, scaler=scaler) as watcher:
        for _ in range(20):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(2, 4)).square().mean().mul(1e20)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert "skipped-steps" in {a.kind for a in watcher.alarms}
    for alarm in watcher.alarms:
        says_all_five_parts(alarm, model, optimizer)
    assert sum(o.skips for o in watcher.run().observations) > 5


@pytest.mark.parametrize("fused", [False, True])
def test_the_parameter_whose_gradient_makes_the_scaler_skip_is_named(tmp_path, fused):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    with ln.watch(model, optimizer, every=3, to=tmp_path, budget=None, scaler=scaler) as watcher:
        for step in range(40):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().mean()
            if step % 3 == 0:
                loss = loss + (model.second.bias * torch.inf).sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scaler.update(4.0)
    said = [a for a in watcher.alarms if a.kind == "skipped-steps"]
    assert [a.name for a in said] == ["second.bias"]
    assert f"of 1 of {len(list(model.parameters()))} parameters were not finite" in said[0].found


UNATTENDED = """
import sys, torch, learnables as ln
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with ln.watch(model, optimizer, 100, sys.argv[1], budget=None, on_alarm="stop"):
    for step in range(1, 1000):
        optimizer.zero_grad()
        loss = (model(torch.randn(8, 2)) - torch.randn(8, 1)).square().mean()
        (loss * float(sys.argv[2]) if step == 7 else loss).backward()
        optimizer.step()
print("trained to the end")
"""


@pytest.mark.parametrize(("factor", "ends"), [("nan", True), ("1.0", False)])
def test_an_unattended_run_stops_with_a_code_and_so_does_what_judges_it(tmp_path, factor, ends):
    """A real process, as a queue of jobs starts it; and the command that a job after it runs."""

    def run(*command):
        command = [sys.executable, "-W", "ignore", *command]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    done = run("-c", UNATTENDED, str(tmp_path / "run"), factor)
    assert done.returncode == int(ends), done.stderr
    assert ("trained to the end" in done.stdout) == (not ends)
    if ends:
        last = done.stderr[done.stderr.rindex("AlarmRaised") :].splitlines()
        assert [line.split(":")[0].strip() for line in last[1:5]] == [
            *("where", "found", "wanted", "mend")
        ]
        assert "step 7" in last[1]
    judged = run("-m", "learnables", "report", str(tmp_path / "run"), "--fail-on", "error")
    assert judged.returncode == int(ends), judged.stderr
    seen = Run(tmp_path / "run")
    assert [a.kind for a in seen.alarms] == ["non-finite"] * ends
    assert seen.steps == (7 if ends else 999)
    assert not seen.damage


@pytest.mark.parametrize("checked", [True, False])
def test_who_is_not_checked_at_every_step_is_not_blamed_for_writing_to_weights(
    tmp_path, monkeypatch, checked
):
    """A gradient was not finite while nobody looked; that somebody wrote to it would be a guess."""
    model = Model()
    optimizer = adam(model)
    with ln.watch(model, optimizer, every=10, to=tmp_path) as watcher:
        monkeypatch.setattr(watcher.governor, "watches", lambda step: checked or step < 5)
        monkeypatch.setattr(watcher.governor, "due", lambda step: step % 10 == 0)
        for step in range(1, 11):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().mean().backward()
            if step == 7:
                model.shift.grad[0] = math.nan
            optimizer.step()
    (alarm,) = watcher.alarms
    assert (alarm.kind, alarm.name) == ("non-finite", "shift")
    if checked:
        assert (alarm.step, alarm.what) == (7, "the gradient is not finite")
    else:
        assert (alarm.step, alarm.what) == (
            10,
            "the weight has become non-finite in a step that there was no time to check",
        )
        assert "all weights were finite after step 4" in alarm.found
    says_all_five_parts(alarm, model, optimizer)


def test_a_callback_hears_each_alarm_once_and_in_order_with_the_step_it_is_about(tmp_path):
    model, heard = Model(), []
    optimizer = adam(model, weight_decay=0.0)
    optimizer.register_step_post_hook(lambda *_: model.shift.data.fill_(0.1))

    def hear(alarm):
        heard.append((alarm, watcher.step))

    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None, on_alarm=hear) as watcher:
        for step in range(1, 12):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            if step == 9:
                model.first.bias.grad[3] = math.inf
            optimizer.step()
    assert [alarm for alarm, _ in heard] == watcher.alarms
    kinds = [(alarm.kind, alarm.name, alarm.step) for alarm, _ in heard]
    assert kinds[:2] == [("frozen", "shift", 5), ("non-finite", "first.bias", 9)]
    assert all(alarm.step <= at <= alarm.step + 1 for alarm, at in heard)


class Normed(nn.Module):
    """Only the direction of ``first`` matters, so that nothing but its decay holds its length."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 16, bias=False, dtype=dtype)
        self.second = nn.Linear(16, 4, dtype=dtype)

    def forward(self, x):
        x = x.to(self.first.weight.dtype)
        return self.second(torch.tanh(nn.functional.layer_norm(self.first(x), (16,)))) - 1


def kinds(alarms):
    return {(a.kind, a.name) for a in alarms}


@pytest.mark.parametrize(("lr", "found"), [(2.1, True), (0.05, False)])
def test_a_learning_rate_beyond_what_is_stable_is_seen_by_the_ratio(tmp_path, lr, found):
    model = nn.Linear(4, 1, bias=False)
    alarms = train(tmp_path, model, torch.optim.SGD(model.parameters(), lr=lr), steps=30)
    assert (("too-fast", "weight") in kinds(alarms)) == found
    assert found or alarms == []


@pytest.mark.parametrize(("lr", "found"), [(1e-12, True), (1e-3, False)])
def test_a_learning_rate_that_does_nothing_is_seen_by_the_ratio(tmp_path, lr, found):
    model = Normed(torch.float64)
    alarms = train(tmp_path, model, adam(model, lr=lr, weight_decay=0.0), steps=8)
    wanted = {("too-slow", name) for name, _ in model.named_parameters()}
    assert kinds(alarms) == (wanted if found else set())


@pytest.mark.parametrize(("decay", "found"), [(500.0, True), (0.01, False)])
def test_a_scale_that_decays_to_nothing_is_seen(tmp_path, decay, found):
    model = Normed()
    groups = [{"params": model.first.parameters(), "weight_decay": decay}]
    groups += [{"params": model.second.parameters(), "weight_decay": 0.0}]
    alarms = train(tmp_path, model, torch.optim.SGD(groups, lr=1e-4), steps=160, every=4)
    assert kinds(alarms) == ({("drift", "first.weight")} if found else set())
    assert not found or "0.02 to 20 times" in alarms[0].wanted


@pytest.mark.parametrize(
    ("dtype", "sign", "found"),
    [(torch.float16, -1, True), (torch.float16, 1, False), (torch.float32, -1, False)],
)
def test_a_weight_that_nears_the_end_of_float16_is_seen(tmp_path, dtype, sign, found):
    model = nn.Module()
    model.gain = nn.Parameter(torch.full((4,), 4000.0, dtype=dtype))
    model.forward = lambda x: (sign * model.gain.float() * x.abs()).sum().clamp(-1e9, 1e9)
    optimizer = torch.optim.SGD(model.parameters(), lr=4.0)
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        for _ in range(12):
            optimizer.zero_grad()
            model.forward(torch.full((32, 4), 4.0)).backward()
            optimizer.step()
    assert kinds(watcher.alarms) == ({("saturation", "gain")} if found else set())
    for alarm in watcher.alarms:
        says_all_five_parts(alarm, model, optimizer)


@pytest.mark.parametrize("immediate", [True, False], ids=["at once", "read later"])
@pytest.mark.parametrize("quantity", ["weight", "gradient", "update"])
def test_the_first_non_finite_value_is_named(tmp_path, quantity, immediate):
    """Any parameter, any step: 5 draws for each of 6 cases here, 200 of each in the slow test."""
    for seed in range(5):
        named_correctly(tmp_path / str(seed), quantity, immediate, seed)


@pytest.mark.slow
@pytest.mark.parametrize("immediate", [True, False], ids=["at once", "read later"])
@pytest.mark.parametrize("quantity", ["weight", "gradient", "update"])
def test_the_first_non_finite_value_is_named_200_times(tmp_path, quantity, immediate):
    for seed in range(200):
        named_correctly(tmp_path / str(seed), quantity, immediate, seed)


def named_correctly(folder, quantity, immediate, seed):
    model = Model()
    names = [name for name, _ in model.named_parameters()]
    draw = torch.Generator().manual_seed(seed)
    name = names[int(torch.randint(len(names), (), generator=draw))]
    at = int(torch.randint(2, 25, (), generator=draw))
    value = (math.nan, math.inf, -math.inf)[seed % 3]
    p = model.get_parameter(name)
    element = int(torch.randint(p.numel(), (), generator=draw))
    optimizer = adam(model)

    def poison(step, *_):
        if step == at and (target := p.grad if quantity == "gradient" else p.data) is not None:
            target.view(-1)[element] = value

    if quantity == "update":
        counted = iter(range(1, 100))
        optimizer.register_step_post_hook(lambda *_: poison(next(counted)))
    with ln.watch(model, optimizer, every=10, to=folder, budget=None) as watcher:
        watcher._sentinel.immediate = immediate
        for step in range(1, 31):
            optimizer.zero_grad()
            if quantity == "weight":
                poison(step)
            model(torch.ones(2, 4)).square().mean().backward()
            if quantity == "gradient":
                poison(step)
            optimizer.step()
    alarm = watcher.alarms[0]
    assert (alarm.kind, alarm.name, alarm.step) == ("non-finite", name, at), (alarm, name, at)
    assert f"in the {quantity} of" in alarm.found
    says_all_five_parts(alarm, model, optimizer)


def test_a_hostile_name_commands_no_terminal_by_its_alarm(tmp_path):
    name = "\x1b[2J\nall is well"
    model = nn.Linear(4, 1)
    model.register_parameter(name, nn.Parameter(torch.ones(1)))
    optimizer = adam(model)
    with ln.watch(model, optimizer, every=1, to=tmp_path, on_alarm="stop") as watcher:
        model.get_parameter(name).grad = torch.full((1,), math.nan)
        with pytest.raises(AlarmRaised) as caught:
            optimizer.step()
    (alarm,) = watcher.alarms
    assert alarm.name == name
    for text in (str(alarm), str(caught.value)):
        assert len(text.splitlines()) == 5
        assert all(line.isprintable() for line in text.splitlines())
        assert r"\x1b[2J\x0aall is well, step 1" in text
