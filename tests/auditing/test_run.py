"""What `audit` promises: it says exactly what is wrong, and leaves no trace."""

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import learnables as ln
from learnables.auditing.memory import random_states
from learnables.errors import LearnablesError

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "Muon": lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Dropout(0.2))


def a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        optimizer.zero_grad()
        noise = random.random() + float(np.random.rand())  # noqa: NPY002 - the global state is meant
        value = (model(torch.randn(6, 3)) - noise).square().mean()
        value.backward()
        return value

    if isinstance(optimizer, torch.optim.LBFGS):
        return lambda: optimizer.step(loss)

    def step() -> Tensor:
        value = loss()
        optimizer.step()
        return value

    return step


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "grads": [p.grad for p in model.parameters()],
            "optimizer": optimizer.state_dict(),
            "random": random_states(),
            "training": [m.training for m in model.modules()],
        }
    )


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(sorted(OPTIMIZERS)),
    steps_before=st.integers(0, 2),
    steps=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_after_an_audit_everything_is_bit_identical(
    kind: str, steps_before: int, steps: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = two_layers()
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    step = a_step(model, optimizer)
    for _ in range(steps_before):
        step()
    objects = [id(p) for p in model.parameters()]
    before = everything(model, optimizer)
    report = ln.audit(model, optimizer, step, steps=steps)
    assert same(before, everything(model, optimizer))
    assert objects == [id(p) for p in model.parameters()]
    assert report.not_restored == []
    assert report.iterations == steps


@given(
    kept=st.sets(st.sampled_from(NAMES)),
    frozen=st.sets(st.sampled_from(NAMES)),
    named=st.booleans(),
)
def test_exactly_what_was_left_out_is_named_and_typing_each_mend_empties_the_list(
    kept: set[str], frozen: set[str], named: bool
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    params = dict(model.named_parameters())
    for name in frozen:
        params[name].requires_grad_(False)
    spare = ("spare", nn.Parameter(torch.zeros(1)))  # an optimizer must hold at least one tensor
    held = [spare, *((name, params[name]) for name in sorted(kept))]
    optimizer = torch.optim.SGD(held if named else [p for _, p in held], lr=0.1)

    report = ln.audit(model, optimizer, select=["LRN201"])
    assert {name for f in report.findings for name in f.where} == set(NAMES) - kept - frozen
    for finding in report.findings:
        exec(finding.mend, {"model": model, "optimizer": optimizer})
    assert ln.audit(model, optimizer, select=["LRN201"]).findings == []


def globals_of_torch() -> dict[str, Any]:
    from torch.nn.modules import module
    from torch.nn.utils import clip_grad
    from torch.optim import lr_scheduler, optimizer

    classes = (
        nn.Module,
        Tensor,
        torch.optim.Optimizer,
        torch.amp.GradScaler,
        torch.autograd.Function,
        lr_scheduler.LRScheduler,
        lr_scheduler.ReduceLROnPlateau,
        lr_scheduler.SequentialLR,
    )
    hooks = {k: dict(v) for k, v in vars(module).items() if k.startswith("_global_") and v}
    return {
        "classes": {  # without what copyreg caches on a class at the first pickling
            c: {k: v for k, v in vars(c).items() if k != "__slotnames__"} for c in classes
        },
        "hooks": hooks,
        "optimizer hooks": [
            dict(optimizer._global_optimizer_pre_hooks),
            dict(optimizer._global_optimizer_post_hooks),
        ],
        "autograd": (torch.autograd.backward, torch.autograd.grad),
        "clip": dict(vars(clip_grad)),
        "utils": dict(vars(nn.utils)),
        "mode": torch._C._len_torch_function_stack(),
    }


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_patched_remains(raises: bool) -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = a_step(model, optimizer)

    def step() -> Tensor:
        value = plain()
        if raises:
            raise ValueError("broken")
        return value

    ln.audit(model, optimizer, plain, steps=1)  # lazy imports are done now
    before = globals_of_torch()
    ln.audit(model, optimizer, step)
    assert globals_of_torch() == before
    assert all(not p._backward_hooks for p in model.parameters())
    with ln.observe(model, optimizer):
        plain()
    assert globals_of_torch() == before


def test_closure_of_the_step_is_put_back_too() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain, count, calls = a_step(model, optimizer), [0], 0
    drawn = torch.Generator().manual_seed(1)

    def step() -> Tensor:
        nonlocal calls
        calls += 1
        count[0] += 1
        torch.rand(2, generator=drawn)
        return plain()

    state = drawn.get_state()
    assert ln.audit(model, optimizer, step).not_restored == []
    assert (count, calls) == ([0], 0)
    assert torch.equal(drawn.get_state(), state)


def test_consumed_batches_are_listed() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = (torch.randn(2, 3) for _ in range(9))

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(next(batches)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    (lost,) = ln.audit(model, optimizer, step).not_restored
    assert "batches: a generator that was advanced" in lost


def test_value_and_gradient_before_and_after_are_in_the_table() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = ln.audit(model, optimizer, a_step(model, optimizer))
    row = report.parameters[0]
    assert (row.name, row.shape, row.dtype, row.groups) == ("weight", (1, 3), "float32", 1)
    assert row.value_before == pytest.approx(float(model.weight.detach().norm()))
    assert row.moved == 4
    assert row.gradient_first is not None
    assert row.gradient_first > 0
    assert row.update is not None
    assert row.ratio == pytest.approx(row.update / row.value_before)


def test_observing_changes_nothing_and_finds_model_and_optimizer_by_itself() -> None:
    def train(observed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the global state is meant
        model = two_layers()
        model.late = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p is not model.late])
        step = a_step(model, optimizer)
        if observed:
            with ln.observe(steps=2) as seen:
                for _ in range(5):
                    step()
            assert seen.report is not None
            assert seen.report.iterations == 2
            assert ["late"] in [f.where for f in seen.report.findings]
        else:
            for _ in range(5):
                step()
        return [p.detach() for p in model.parameters()]

    assert same(train(True), train(False))


@pytest.mark.parametrize("clear", ["zero_grad", "by hand"])
@pytest.mark.parametrize("kind", ["in eval mode", "never called"])
def test_an_iteration_begins_where_its_graph_does(kind: str, clear: str) -> None:
    if kind == "in eval mode":
        model = nn.Linear(4, 1).eval()
        forward = model
    else:
        model = nn.ParameterDict({"w": nn.Parameter(torch.ones(4))})
        forward = lambda x: x @ model["w"]  # noqa: E731 - no module's forward runs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = globals_of_torch()
    with ln.observe(model, optimizer, steps=3) as seen:
        for i in range(5):
            loss = forward(torch.randn(8, 4)).square().mean()
            if clear == "zero_grad":
                optimizer.zero_grad()
            else:
                for p in model.parameters():
                    p.grad = None
            loss.backward()
            assert (seen.report is None) == (i < 3)
            optimizer.step()
        assert globals_of_torch() == before  # also while the loop goes on
    assert seen.report is not None
    assert seen.report.findings == []
    assert seen.report.iterations == 3


def test_a_silenced_finding_is_listed_with_its_reason() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    meant = ln.silence("missing-from-optimizer", "bias", reason="stepped by hand")
    try:
        report = ln.audit(model, optimizer)
    finally:
        meant.remove()
    assert report.ok
    assert [(f.where, why) for f, why in report.silenced] == [(["bias"], "stepped by hand")]
    assert not ln.audit(model, optimizer).ok
    with pytest.raises(LearnablesError, match="without a reason"):
        ln.silence("LRN201", "bias", reason=" ")


def no_loss() -> None:
    return None


def test_a_raising_step_is_named_and_the_state_restored() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain, calls = a_step(model, optimizer), [0]

    def step() -> Tensor:
        calls[0] += 1
        loss = plain()
        if calls[0] == 2:
            raise ValueError("broken batch")
        return loss

    before = everything(model, optimizer)
    report = ln.audit(model, optimizer, step)
    assert same(before, everything(model, optimizer))
    assert calls == [0]
    (finding,) = [f for f in report.findings if f.code == "LRN412"]
    assert "ValueError: broken batch in iteration 2" in finding.found
    assert finding.quote == 'raise ValueError("broken batch")'
    assert isinstance(report.crashed, ValueError)


def test_a_step_without_backward_a_model_on_meta_and_no_parameter_are_no_crash() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert ln.audit(model, optimizer, no_loss).codes == ["LRN413"]
    assert ln.audit(nn.ReLU()).findings == []
    meta = nn.Linear(3, 1, device="meta")
    assert ln.audit(meta, torch.optim.SGD(meta.parameters(), lr=0.1)).findings == []


@pytest.mark.parametrize(
    ("spoil", "codes"),
    [
        (lambda loss: loss.detach(), ["LRN412"]),  # without graph: backward raises
        (lambda loss: loss * math.nan, ["LRN303", "LRN414"]),
        (lambda loss: loss * math.inf, ["LRN303", "LRN414"]),
    ],
    ids=["without graph", "NaN", "infinite"],
)
def test_a_loss_that_trains_nothing_is_named_and_the_state_restored(
    spoil: Callable[[Tensor], Tensor], codes: list[str]
) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    x = torch.randn(4, 3)

    def step() -> None:  # and returns no loss
        optimizer.zero_grad()
        spoil(model(x).square().mean()).backward()
        optimizer.step()

    before = everything(model, optimizer)
    assert ln.audit(model, optimizer, step).codes == codes
    assert same(before, everything(model, optimizer))


def test_a_foreign_optimizer_is_named_once() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(nn.Linear(3, 1).parameters(), lr=0.1)
    assert ln.audit(model, optimizer).codes == ["LRN203"]


def test_the_arguments_are_checked() -> None:
    with pytest.raises(LearnablesError, match="steps is too small"):
        ln.audit(nn.Linear(3, 1), steps=0)


@pytest.mark.parametrize(
    ("value", "accused"),
    [
        (lambda: nn.init.orthogonal_(torch.empty(6, 8, 8)), True),
        (lambda: torch.eye(6, 64).reshape(6, 8, 8), False),
        (lambda: torch.randn(6, 8, 8), False),
    ],
)
def test_only_a_stack_that_was_drawn_as_one_matrix_is_accused(
    value: Callable[[], torch.Tensor], accused: bool
) -> None:
    model = nn.Module()
    model.heads = nn.Parameter(value())
    found = [finding.code for finding in ln.audit(model).findings]
    assert ("LRN728" in found) == accused
