import math
import time
from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

import learnables as ln
from learnables.errors import LearnablesError, LearnablesWarning
from learnables.watching import AlarmRaised, recorder
from learnables.watching.sinks import Sink


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_share_that_rounding_loses_is_that_of_a_slow_twin(tmp_path, dtype):
    """Elements that had a gradient and are the same number after the step."""
    torch.manual_seed(0)
    model = nn.Linear(64, 1, bias=False, dtype=dtype)
    model.weight.data *= torch.logspace(-4, 3, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6 if dtype is torch.float32 else 1e-2)
    wanted = []
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        for _ in range(3):
            before = model.weight.detach().clone()
            optimizer.zero_grad()
            x = torch.randn(1, 64) * (torch.rand(1, 64) < 0.7)  # some have no gradient at all
            model(x.to(dtype)).sum().backward()
            optimizer.step()
            had = model.weight.grad != 0
            wanted.append((had & (model.weight == before)).sum().item() / had.sum().item())
    seen = [o.columns["lost"][0] for o in watcher.run().observations]
    assert seen == pytest.approx(wanted, abs=1e-6)
    assert all(0.05 < share < 0.95 for share in wanted)
    digits = {torch.float32: None, torch.bfloat16: 7, torch.float16: 10}[dtype]
    found = watcher.run().observations[0].columns
    assert found["digits"][0] == digits if digits else "digits" not in found


def test_the_distance_from_a_set_is_the_sets_own_violation_at_each_look(tmp_path):
    model = nn.Module()
    model.mix = ln.parameter(torch.full((4, 3), 1 / 3), constraint=ln.sets.Simplex())
    model.turn = ln.parameter(torch.eye(3), constraint=ln.sets.Orthogonal())
    model.free = ln.parameter(torch.ones(3))
    model.none = ln.parameter(torch.zeros(0, 3), constraint=ln.sets.Simplex())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wanted = []
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        for step in range(3):
            optimizer.zero_grad()
            weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            ((model.mix * weights).sum() + model.turn.square().sum() + model.free.sum()).backward()
            optimizer.step()
            mix = ln.sets.Simplex().violation(model.mix.detach()).max().item()
            turn = ln.sets.Orthogonal().violation(model.turn.detach()).max().item()
            wanted.append([mix, turn, math.nan, math.nan])
    assert watcher.failed is None
    for seen, one in zip(watcher.run().observations, wanted, strict=True):
        assert seen.columns["defect"].tolist() == pytest.approx(one, rel=1e-6, nan_ok=True)
    assert wanted[0][0] > 1e-2
    assert wanted[0][1] > 1e-2
    ratios = {p.name: p.policy.get("declared constraint") for p in watcher.run().parameters}
    assert ratios["free"] is None
    assert "Simplex" in ratios["mix"]


def test_learning_rates_are_those_of_each_group_at_each_step(tmp_path):
    model, _ = make()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": [model[2].weight]}]
    groups.append({"params": [model[2].bias], "lr": torch.tensor(0.25)})
    optimizer = torch.optim.SGD(groups, lr=0.5)
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        for _ in range(2):
            quadratic(model, optimizer)
            optimizer.param_groups[0]["lr"] *= 0.5
    found = [o.columns["lr"].tolist() for o in watcher.run().observations]
    assert found[0] == pytest.approx([0.1, 0.1, 0.5, 0.25])
    assert found[1] == pytest.approx([0.05, 0.05, 0.5, 0.25])


def test_a_look_that_has_not_arrived_is_not_waited_for_and_is_read_at_the_next(
    tmp_path, monkeypatch
):
    """On a device the copy is under way; nobody asks for the numbers before they are there."""
    arrived, waits = [False], []
    read = recorder.Packed.read

    def reading(packed):
        waits.append(watcher.step)
        return read(packed)

    monkeypatch.setattr(recorder.Packed, "ready", property(lambda _: arrived[0]))
    monkeypatch.setattr(recorder.Packed, "read", reading)
    model, optimizer = make()
    with ln.watch(model, optimizer, every=3, to=tmp_path, budget=None) as watcher:
        quadratic(model, optimizer, 5)
        assert waits == [3]  # that of step 1, when that of step 3 was to be sent
        quadratic(model, optimizer)
        assert waits == [3, 6]
        arrived[0] = True
        quadratic(model, optimizer)
        assert waits == [3, 6, 6]  # there it was, before step 7 was counted
    assert [o.step for o in watcher.run().observations] == [1, 3, 6]


def test_a_look_is_one_tensor_and_one_copy(tmp_path, monkeypatch):
    """However many parameters and optimizers, with everything that a look can hold."""
    copies = []
    made = recorder.Packed.__init__

    def counting(self, *args):
        made(self, *args)
        kept = [v for v in vars(self).values() if isinstance(v, torch.Tensor)]
        copies.append((len(kept), kept[0].dtype, kept[0].ndim))

    monkeypatch.setattr(recorder.Packed, "__init__", counting)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)), nn.Linear(4, 1))
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    with ln.watch(model, optimizers, every=1, to=tmp_path, budget=None) as watcher:
        model(torch.ones(1, 4)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert len(watcher.run().observations) == 1
    assert copies == [(1, torch.float64, 1)]


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


def test_of_several_evaluations_the_last_is_the_gradient_that_is_recorded(tmp_path):
    """LBFGS asks for some, at other weights each."""
    model, _ = make()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    evaluated, x = [], torch.randn(16, 8)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        evaluated.append([p.grad.norm().item() for p in model.parameters()])
        return loss

    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        for _ in range(2):
            del evaluated[:]
            optimizer.step(closure)
            assert len(evaluated) > 2
    seen = watcher.run().observations[-1]
    assert seen.stage == "closure"
    assert seen.rows["gradient"].norm.tolist() == pytest.approx(evaluated[-1], rel=1e-6)
    assert seen.rows["gradient"].norm[0] != pytest.approx(evaluated[0][0], rel=1e-3)


def test_a_closure_may_be_named_and_its_loss_comes_back(tmp_path):
    model, optimizer = make()

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 8)).square().mean()
        loss.backward()
        return loss

    with (
        ln.watch(model, optimizer, every=1, to=tmp_path / "a", budget=None),
        ln.watch(model, optimizer, every=1, to=tmp_path / "b", budget=None) as watcher,
    ):
        expected = model(torch.ones(4, 8)).square().mean().item()
        assert optimizer.step(closure=closure).item() == expected
    assert [o.stage for o in watcher.run().observations] == ["closure"]


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


def compiled_counts(folder, compiled, watched):
    """Graph breaks and compilations of a short training; the steps that were looked at."""
    torch._dynamo.reset()
    counters.clear()
    model, optimizer = make(foreach=True)
    trained = torch.compile(model, backend="aot_eager") if "model" in compiled else model
    step = optimizer.step
    if "step" in compiled:
        step = torch.compile(optimizer.step, backend="aot_eager")
    watcher = ln.watch(trained, optimizer, every=2, to=folder, budget=None) if watched else None
    for _ in range(6):
        optimizer.zero_grad()
        trained(torch.ones(4, 8)).square().mean().backward()
        step()
    counts = {k: dict(counters[k]) for k in ("stats", "graph_break", "recompiles")}
    if watcher is None:
        return counts, None
    watcher.close()
    assert watcher.failed is None
    return counts, [o.step for o in watcher.run().observations]


@pytest.mark.filterwarnings("ignore:.*record function.*")
@pytest.mark.parametrize("compiled", ["model", "step", "model and step"])
def test_what_is_compiled_gets_no_graph_break_and_no_recompilation(tmp_path, capsys, compiled):
    without, _ = compiled_counts(tmp_path, compiled, watched=False)
    counts, looks = compiled_counts(tmp_path, compiled, watched=True)
    assert without["stats"]["unique_graphs"] >= 1
    assert not without["graph_break"] or "step" in compiled  # torch itself breaks that
    breaks, own = Counter(counts.pop("graph_break")), Counter(without.pop("graph_break"))
    assert breaks <= own  # on some builds torch's own come only the first time
    assert counts == without
    if "step" in compiled:  # it hides from hooks, and is not broken to be looked into
        assert looks == []
        assert "no optimizer step was seen" in capsys.readouterr().err
    else:
        assert looks == [1, 2, 4, 6]


def test_parameters_outside_every_optimizer_are_seen_too(tmp_path):
    model, _ = make()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        quadratic(model, optimizer)
    (seen,) = watcher.run().observations
    assert seen.rows["gradient"].present.tolist() == [True] * 4
    assert seen.rows["update"].present.tolist() == [True, True, False, False]
    outside = watcher.run().parameters[2]
    assert outside.policy["optimizer"] == "in no group"


@pytest.mark.parametrize(
    "quantities", [("weight",), ("gradient",), ("update",), ("gradient", "update")]
)
def test_only_the_chosen_quantities_and_parameters_are_read(tmp_path, quantities):
    model, optimizer = make()
    with ln.watch(
        model,
        optimizer,
        every=1,
        to=tmp_path,
        budget=None,
        quantities=quantities,
        select="*.bias",
        histogram=False,
    ) as watcher:
        quadratic(model, optimizer, 8)
    assert watcher.failed is None
    seen = watcher.run().observations[-1]
    assert set(seen.rows) == set(quantities)
    assert seen.names == ("0.bias", "2.bias")
    assert all(rows.histogram is None for rows in seen.rows.values())


def dtype_model(dtype):
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3, 2, dtype=dtype))
    model.empty = nn.Parameter(torch.zeros(0, dtype=dtype))
    model.scalar = nn.Parameter(torch.tensor(2.0, dtype=dtype))
    model.turned = nn.Parameter(torch.ones(2, 3, dtype=dtype).t())
    return model


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
)
def test_every_dtype_and_shape_is_counted(tmp_path, dtype):
    model = dtype_model(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        for _ in range(2):
            optimizer.zero_grad()
            sum((p * p.conj()).real.sum() for p in model.parameters()).backward()
            optimizer.step()
    assert watcher.failed is None
    parts = 2 if dtype.is_complex else 1
    counts = watcher.run().observations[-1].rows["update"].moments["count"].tolist()
    assert counts == [6 * parts, 0, parts, 6 * parts]


def test_a_model_that_gets_its_memory_after_the_watch_began_is_watched(tmp_path):
    """Made on the meta device, with parameters that stay the same objects when they move."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = nn.Linear(8, 1, device="meta")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
            model.to_empty(device="cpu")
            model.reset_parameters()
            quadratic(model, optimizer, 2)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
    assert watcher.failed is None
    assert [o.step for o in watcher.run().observations] == [1, 2]
    assert (watcher.run().series("update", "norm", "weight").values > 0).all()


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake tensors"])
def test_a_training_without_values_ends_the_watch_only(tmp_path, fake):
    """A dry run: shapes go through the loop, and there is nothing to look at."""
    with FakeTensorMode() if fake else torch.device("meta"):
        model, optimizer = make()
        watcher = ln.watch(model, optimizer, every=1, to=tmp_path, budget=None)
        with pytest.warns(LearnablesWarning, match="watching has failed") as caught:
            quadratic(model, optimizer, 3)
        watcher.close()
    assert len(caught) == 1
    assert "values" in str(watcher.failed)


class Marked(torch.Tensor):
    """A subclass of tensor whose memory is its own."""


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize(
    ("value", "count"),
    [
        (torch.ones(3).as_subclass(Marked), 3),
        (torch.eye(3).to_sparse(), 3),
        (torch.ones(6)[::2], 3),
        (torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), 96),
        (torch.ones(0, 3), 0),
        (torch.tensor(2.0), 1),
        (torch.ones(3, dtype=torch.complex128), 6),
    ],
    ids=["subclass", "COO", "strided", "channels_last", "empty", "0-dim", "complex"],
)
def test_a_parameter_of_any_kind_is_read_with_its_gradient_and_its_update(tmp_path, value, count):
    model = nn.Module()
    model.odd, model.plain = nn.Parameter(value.clone()), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        for _ in range(2):
            optimizer.zero_grad()
            sparse = model.odd.layout is not torch.strided
            total = torch.sparse.sum(model.odd) if sparse else (model.odd * model.odd.conj()).sum()
            (total.real + model.plain.sum()).backward()
            optimizer.step()
    assert watcher.failed is None
    for o in watcher.run().observations:
        for quantity in ("weight", "gradient", "update"):
            assert o.rows[quantity].moments["count"].tolist() == [count, 2]
    if count:
        first = watcher.run().observations[0]
        step = first.rows["update"].norm[0] / first.rows["gradient"].norm[0]
        assert step == pytest.approx(0.25)


def test_a_sparse_gradient_is_read(tmp_path):
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        model(torch.tensor([1, 1, 3])).sum().backward()
        optimizer.step()
    assert watcher.failed is None
    (seen,) = watcher.run().observations
    assert seen.rows["gradient"].moments["count"].tolist() == [8]
    assert seen.rows["gradient"].moments["max"].tolist() == [2.0]


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, max_iter=3)


@pytest.mark.parametrize(
    "factory",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.Muon([x for x in p if x.ndim == 2]),
        torch.optim.Adafactor,
        torch.optim.Rprop,
        lbfgs,
    ],
    ids=["SGD", "AdamW fused", "AdamW foreach", "Muon", "Adafactor", "Rprop", "LBFGS"],
)
def test_the_update_is_what_changed_whatever_the_optimizer(tmp_path, factory):
    model, _ = make()
    optimizer = factory(list(model.parameters()))
    held = {p for group in optimizer.param_groups for p in group["params"]}

    def closure():
        optimizer.zero_grad()
        loss = model(torch.linspace(-1, 1, 32).view(4, 8)).square().mean()
        loss.backward()
        return loss

    truth = []
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        for _ in range(3):
            before = [p.detach().double().clone() for p in model.parameters()]
            optimizer.step(closure)
            after = [p.detach().double() for p in model.parameters()]
            truth.append(
                [float((b - a).norm() / a.norm()) for a, b in zip(before, after, strict=True)]
            )
    assert watcher.failed is None
    for seen, wanted in zip(watcher.run().observations, truth, strict=True):
        for i, p in enumerate(model.parameters()):
            if p in held:
                assert seen.ratio[i] == pytest.approx(wanted[i], rel=1e-6)


def test_only_rank_0_writes_and_every_rank_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)
    model, optimizer = make()
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        quadratic(model, optimizer, 3)
        watcher.log_scalars(1, {"loss": 1.0})
    assert watcher.step == 3
    assert not list(tmp_path.iterdir())


def test_numbers_that_the_loop_records_are_watching_too(tmp_path):
    model, optimizer = make()
    with ln.watch(model, optimizer, every=100, to=tmp_path, sinks=[Slow()]) as watcher:
        for _ in range(5):
            quadratic(model, optimizer)
            before = watcher.governor.spent, watcher.governor.elapsed
            watcher.log_scalars(watcher.step, {"loss": 1.0})
            watcher.log_document("note", "x")
            assert watcher.governor.spent - before[0] >= 0.02
        quadratic(model, optimizer)
        assert watcher.governor.elapsed - before[1] < 0.02


def test_at_its_end_the_watch_says_what_the_governor_chose(tmp_path, capsys):
    model, optimizer = make()
    with ln.watch(model, optimizer, every=2, to=tmp_path, sinks=[Slow()]):
        quadratic(model, optimizer, 60)
    said = capsys.readouterr().err
    assert "5 looks in 60 steps, one every 12, asked for every 2" in said
    assert "the first five come as asked" in said


class Slow(Sink):
    def observation(self, observation):
        time.sleep(0.02)

    def scalars(self, step, values):
        time.sleep(0.02)
