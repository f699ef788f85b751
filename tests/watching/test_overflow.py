"""Which parameter made the gradient scaler skip: of every skipped step, without asking the device.

What the host is asked is counted by two modes: each number that is read from a tensor.
"""

import math
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from tests.gloo import spawn
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import learnables as ln
from learnables.errors import LearnablesError, LearnablesWarning
from learnables.watching import Run
from learnables.watching.gradient import Consumption
from learnables.watching.sentinel import Sentinel, overflows

FAULTS = {5: ("gamma",), 6: ("second.bias",), 11: ("gamma", "first.weight"), 18: ("gamma",)}
STEPS = 20


class Infinite(torch.autograd.Function):
    """Zero, with a gradient of which one element is not finite."""

    @staticmethod
    def forward(ctx, x, bad):
        ctx.shape, ctx.bad = x.shape, bad
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        found = torch.zeros(ctx.shape)
        found.view(-1)[-1] = ctx.bad
        return found, None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.gamma = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.gamma


def train(model, optimizers, scaler, *, bad=math.inf, accumulate=1, clip=None, faults=FAULTS):
    """Twenty steps; those of ``faults`` the scaler skips."""
    parameters = dict(model.named_parameters())
    for step in range(1, STEPS + 1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for micro in range(accumulate):
            loss = model(torch.ones(2, 4)).square().mean()
            if micro == 0:  # the gradients that are added to it are finite
                for name in faults.get(step, ()):
                    loss = loss + Infinite.apply(parameters[name], bad)
            scaler.scale(loss / accumulate).backward()
        for optimizer in optimizers:
            if clip:
                scaler.unscale_(optimizer)
                held = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(held, clip)
            scaler.step(optimizer)
        scaler.update()
        scaler.update(4.0)


def made(kind, model):
    parameters = list(model.parameters())
    if kind == "two optimizers":  # gamma and all of first in the one, second in the other
        return [
            torch.optim.SGD(parameters[:3], lr=1e-3),
            torch.optim.AdamW(parameters[3:], lr=1e-3, fused=True),
        ]
    return [torch.optim.AdamW(parameters, lr=1e-3, fused=kind == "fused")]


def scaling():
    return torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)


KINDS = ("not fused", "fused", "two optimizers")
PATHS = {"as on the CPU": True, "as on a device": False}


@pytest.mark.parametrize("immediate", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"clip": 1.0}], ids=str)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_every_skipped_step_names_its_parameters(kind, bad, options, every, immediate, tmp_path):
    model, scaler = Model(), scaling()
    optimizers = made(kind, model)
    watcher = ln.watch(model, optimizers, every, tmp_path, budget=None, scaler=scaler)
    watcher._sentinel.immediate = immediate
    with watcher:
        train(model, optimizers, scaler, bad=bad, **options)
    assert watcher.overflows == FAULTS
    assert watcher.run().overflows == FAULTS
    assert not watcher.failed
    if every == 1:
        assert [o.step for o in watcher.run().observations if o.skips] == list(FAULTS)
        assert sum(o.skips for o in watcher.run().observations) == len(FAULTS)


def test_without_the_early_look_clipping_by_nan_would_blame_all(tmp_path):
    """What the case of NaN and clipping above is about: the slow, obvious way is wrong."""
    model, scaler = Model(), scaling()
    (optimizer,) = made("not fused", model)
    train(model, [optimizer], scaler, bad=math.nan, clip=1.0, faults={STEPS: ("gamma",)})
    assert all(p.grad.isnan().all() for p in model.parameters())


def test_a_fused_optimizer_needs_no_scaler_handed_over(tmp_path):
    model, scaler = Model(), scaling()
    optimizers = made("fused", model)
    with ln.watch(model, optimizers, 7, tmp_path, budget=None) as watcher:
        train(model, optimizers, scaler)
    assert watcher.overflows == FAULTS


@pytest.mark.parametrize("immediate", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_there_is_no_time_to_check_are_named_too(kind, immediate, tmp_path, monkeypatch):
    model, scaler = Model(), scaling()
    optimizers = made(kind, model)
    watcher = ln.watch(model, optimizers, 7, tmp_path, scaler=scaler)
    watcher._sentinel.immediate = immediate
    monkeypatch.setattr(watcher.governor, "watches", lambda step: False)
    monkeypatch.setattr(watcher.governor, "due", lambda step: step == 1)
    with watcher:
        train(model, optimizers, scaler)
    assert watcher.overflows == watcher.run().overflows == FAULTS


class Asked(TorchFunctionMode):
    """Counts the calls that bring a number to the host."""

    NAMES = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


class Read(TorchDispatchMode):
    """Counts what torch itself reads, from Python or C++."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls += name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
        return func(*args, **(kwargs or {}))


def questions(kind, watched, faults, clip=None):
    """How often the host asked in twenty steps, looks left out."""
    model, scaler = Model(), scaling()
    optimizers = made(kind, model)
    watcher = ln.watch(model, optimizers, 10**6, None, budget=None, scaler=scaler)
    watcher._sentinel.immediate = False  # as on a device
    if not watched:
        watcher.close()
    watcher.governor.due = lambda step: False  # a look may ask
    try:
        with Asked() as asked, Read() as read:
            train(model, optimizers, scaler, faults=faults, clip=clip)
    finally:
        found = watcher.overflows if watcher.close() is None else {}
    assert found == (faults if watched else {})
    return asked.calls, read.calls


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("faults", [{}, FAULTS], ids=["no step skipped", "four skipped"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_device_is_asked_no_more_often_than_without_a_watch(kind, faults, clip):
    plain = questions(kind, False, faults, clip)
    assert questions(kind, True, faults, clip) == plain
    # The modes see what there is to be seen: whether to step, once for each optimizer not fused.
    assert plain[1] >= {"not fused": STEPS, "fused": 0, "two optimizers": STEPS}[kind]


def test_only_the_first_64_between_two_looks_are_named_and_all_are_counted():
    sentinel = Sentinel(2, torch.device("cpu"), shared=False)
    sentinel.immediate = False
    fine, bad = torch.ones(2), torch.tensor([1.0, torch.inf])
    flags = [step % 2 for step in range(1, 201)]
    for step, flag in enumerate(flags, 1):
        how = Consumption(None, torch.tensor(float(flag)), "step")
        sentinel.before(step, [0, 1], [fine, fine], [fine, bad if flag else fine], how)
    count, named = overflows(sentinel.take().overflows.tolist(), 2)
    assert count == sum(flags)
    assert named == dict.fromkeys(range(1, 129, 2), (1,))
    assert not sentinel.holds_overflows


def test_what_was_seen_early_counts_for_that_step_only(tmp_path, monkeypatch):
    """Where there was no time to look early again, the gradients are read as they are."""
    model, scaler = Model(), scaling()
    (optimizer,) = made("not fused", model)
    asked = []

    def watches(step):  # time after unscale_ of step 4, and none before that step any more
        asked.append(step)
        return asked == [1, 2, 2, 3, 3, 4]

    with ln.watch(model, optimizer, 7, tmp_path, scaler=scaler) as watcher:
        monkeypatch.setattr(watcher.governor, "watches", watches)
        monkeypatch.setattr(watcher.governor, "due", lambda step: step == 1)
        train(model, [optimizer], scaler, clip=1.0)
    assert watcher.overflows == FAULTS


def test_the_page_says_whose_gradients_made_the_scaler_skip(tmp_path):
    model, scaler = Model(), scaling()
    optimizers = made("not fused", model)
    with ln.watch(model, optimizers, 7, tmp_path / "run", budget=None, scaler=scaler):
        train(model, optimizers, scaler)
    page = ln.write_html(tmp_path / "run", tmp_path / "page.html")
    assert "4, gamma in 3" in page.read_text(encoding="utf-8")
    with ln.watch(model, optimizers, 7, tmp_path / "frozen", select="first.bias", scaler=scaler):
        train(model, optimizers, scaler)  # of those that are watched none is to blame
    assert set(Run(tmp_path / "frozen").overflows.values()) == {()}
    ln.write_html(tmp_path / "frozen", tmp_path / "page.html")


@pytest.mark.parametrize("name", ["before", "overflow", "unscaled", "take"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bug_of_ours_around_a_scaler_ends_the_watch_only(name, kind, tmp_path, monkeypatch):
    """Bit for bit, the loss scale included, though the scaler's own methods are wrapped."""

    def trained(watched):
        model, scaler = Model(), scaling()
        optimizers = made(kind, model)
        if watched:
            watcher = ln.watch(model, optimizers, 3, tmp_path, budget=None, scaler=scaler)
        train(model, optimizers, scaler, clip=1.0)
        if watched:
            watcher.close()
            assert isinstance(watcher.failed, ZeroDivisionError)
            assert not {"step", "unscale_"} & vars(scaler).keys()
        return [*model.parameters(), torch.tensor(scaler.get_scale())]

    wanted = trained(False)
    monkeypatch.setattr(Sentinel, name, lambda *_, **__: 1 // 0)
    if name == "overflow" and kind == "fused":
        monkeypatch.setattr("learnables.watching.governor.Governor.watches", lambda *_: False)
    with pytest.warns(LearnablesWarning, match="watching has failed") as caught:
        found = trained(True)
    assert len(caught) == 1
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


class Stranger:
    """An optimizer of another library, without torch's hooks."""

    def __init__(self) -> None:
        self.param_groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": 0.1}]
        self.steps = 0

    def step(self):
        self.steps += 1


def test_what_the_scaler_steps_besides_goes_on_unwatched(tmp_path):
    model, scaler, other = Model(), scaling(), Stranger()
    optimizers = made("not fused", model)
    with ln.watch(model, optimizers, 7, tmp_path, budget=None, scaler=scaler) as watcher:
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        other.param_groups[0]["params"][0].grad = torch.ones(2)
        scaler.unscale_(other)
        scaler.step(other)
        scaler.step(optimizers[0])
        scaler.update()
    assert (other.steps, watcher.step, watcher.failed) == (1, 1, None)


def test_what_is_no_scaler_is_refused_by_its_name(tmp_path):
    class NativeScaler:
        def __call__(self, loss, optimizer):
            raise AssertionError

    model = Model()
    with pytest.raises(LearnablesError, match="has no step") as caught:
        ln.watch(model, made("fused", model), to=tmp_path, scaler=NativeScaler())
    assert "NativeScaler" in caught.value.found


def two_ranks(rank, folder):
    """The same training with the parameters in parts; most faults lie on one rank only."""
    for kind in ("fused", "not fused"):
        model, scaler = fully_shard(Model()), scaling()
        (optimizer,) = made(kind, model)
        faults = {
            2: [(1, "second.weight", math.inf)],
            5: [(1, "gamma", math.nan), (0, "first.weight", math.inf), (0, "gamma", math.inf)],
            7: [(0, "first.bias", math.nan)],
        }
        folder_of_kind = f"{folder}/{kind}"
        with ln.watch(model, optimizer, 4, folder_of_kind, budget=None, scaler=scaler) as watcher:
            for step in range(1, 9):
                optimizer.zero_grad()
                scaler.scale(model(torch.ones(2, 4)).square().mean()).backward()
                for where, name, value in faults.get(step, ()):
                    if where == rank:
                        model.get_parameter(name).grad.to_local().view(-1)[0] = value
                scaler.step(optimizer)
                scaler.update()
                scaler.update(4.0)
        assert watcher.failed is None


def test_a_fault_on_any_rank_names_the_parameter(tmp_path):
    spawn(two_ranks, 2, str(tmp_path))
    for kind in ("fused", "not fused"):
        run = Run(tmp_path / kind)
        found = {step: set(names) for step, names in run.overflows.items()}
        assert found == {2: {"second.weight"}, 5: {"gamma", "first.weight"}, 7: {"first.bias"}}
        assert sum(o.skips for o in run.observations) == 3


@pytest.mark.parametrize("first", ["watch", "audit"])
def test_an_audit_sees_the_scaler_that_is_watched(first, tmp_path):
    """Gradients that the scaler unscales were taken for scaled ones where the watch began first."""
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    watching = partial(ln.watch, model, optimizer, 1, tmp_path, scaler=scaler, budget=None)
    observing = partial(ln.observe, model, optimizer, scaler=scaler)
    with ExitStack() as stack:
        if first == "watch":
            stack.enter_context(watching())
        seen = stack.enter_context(observing())
        if first == "audit":
            stack.enter_context(watching())
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(8, 4)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert seen.report.ok, seen.report
