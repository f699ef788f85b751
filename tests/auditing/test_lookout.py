"""`ln.observe` with nothing handed over waits for training to begin, whatever the loop is like."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.auditing.test_run import globals_of_torch
from torch import Tensor, nn

import learnables as ln


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.fc = nn.Linear(4, 1)
        self.forgotten = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x * self.scale)


def plain(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def cleared_late(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def in_a_closure(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    def closure() -> Tensor:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        return loss

    optimizer.step(closure)


def in_a_keyword_closure(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure=closure)


def never_cleared_by_a_call(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    for p in model.parameters():
        p.grad = None
    model(x).square().mean().backward()
    optimizer.step()


LOOPS = [plain, cleared_late, in_a_closure, in_a_keyword_closure, never_cleared_by_a_call]


def sgd(model: Net) -> torch.optim.Optimizer:
    return torch.optim.SGD([model.scale, *model.fc.parameters()], lr=0.05, momentum=0.9)


def lbfgs(model: Net) -> torch.optim.Optimizer:
    return torch.optim.LBFGS([model.scale, *model.fc.parameters()], lr=0.1, max_iter=3)


def train(
    step: Callable[..., None], make: Any, observed: bool, evaluates: bool
) -> tuple[Net, Any, list[bool]]:
    torch.manual_seed(0)
    before = globals_of_torch()
    with ln.observe(steps=3) if observed else torch.enable_grad() as seen:
        model = Net()  # built inside: there is nothing to find when the with is entered
        optimizer = make(model)
        done = []
        for _ in range(6):
            if evaluates:
                with torch.no_grad():
                    model.eval()
                    model(torch.randn(2, 4))
                    model.train()
            step(model, optimizer, torch.randn(8, 4))
            done.append(observed and seen.report is not None)
            if done[-1]:
                after = globals_of_torch()  # while the with is still open
    if observed:
        assert after == globals_of_torch() == before
    return model, seen, done


with ln.observe():  # what is imported lazily is imported now
    plain(nn.Linear(1, 1), torch.optim.SGD(nn.Linear(1, 1).parameters()), torch.ones(1, 1))
ln.parameter(1)  # its hook, which is there for good, is no trace of an audit


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("make", [sgd, lbfgs])
@pytest.mark.parametrize("step", LOOPS)
def test_exactly_what_is_wrong_is_found_and_training_is_bit_equal(
    step: Callable[..., None], make: Any, evaluates: bool
) -> None:
    if make is lbfgs and step not in (in_a_closure, in_a_keyword_closure):
        return
    model, seen, done = train(step, make, True, evaluates)
    plain_model, _, _ = train(step, make, False, evaluates)
    for ours, theirs in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert done == [False, False, False, True, True, True]
    assert seen.report.iterations == 3
    assert [(f.code, f.where) for f in seen.report.findings if f.severity != "note"] == [
        ("LRN201", ["forgotten"])
    ]


def test_two_optimizers_take_turns() -> None:
    torch.manual_seed(0)
    before = globals_of_torch()
    with ln.observe(steps=2) as seen:
        actor, critic = nn.Linear(4, 4), nn.Linear(4, 1)
        critic.spare = nn.Parameter(torch.zeros(1))
        first = torch.optim.Adam(actor.parameters())
        second = torch.optim.Adam([critic.weight, critic.bias])
        for _ in range(6):
            x = torch.randn(8, 4)
            second.zero_grad()
            (critic(actor(x).detach()).mean() - critic(x).square().mean()).backward()
            second.step()
            first.zero_grad()
            critic(actor(x)).mean().backward()
            first.step()
        assert globals_of_torch() == before
    assert seen.report is not None
    assert [f.where for f in seen.report.findings if f.code == "LRN201"] == [["Linear_1.spare"]]
    assert not [f for f in seen.report.findings if f.severity == "error" and f.code != "LRN201"]


def test_nothing_is_compiled_before_the_report_and_nothing_again_after_it() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch.manual_seed(0)
    with ln.observe(steps=2) as seen:
        model = Net()
        optimizer = sgd(model)
        fast = torch.compile(model, backend=backend)
        for i in range(5):
            plain(fast, optimizer, torch.randn(8, 4))
            assert bool(compiled) == (i >= 2)
    assert len(compiled) == 1
    (found,) = [f for f in seen.report.findings if f.severity != "note"]
    assert (found.code, found.where) == ("LRN201", ["_orig_mod.forgotten"])
    torch.compiler.reset()


def test_nothing_trains_nothing_remains() -> None:
    before = globals_of_torch()
    with ln.observe() as seen:
        model = Net()
        model(torch.randn(2, 4)).sum().backward()
    assert globals_of_torch() == before
    assert seen.report is not None
    assert seen.report.iterations == 0


def test_an_exception_passes_and_only_whole_iterations_count() -> None:
    before = globals_of_torch()
    seen = ln.observe(steps=4)
    with pytest.raises(ValueError, match="no more"), seen:  # noqa: PT012 - the loop is the point
        model = Net()
        optimizer = sgd(model)
        for i in range(9):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            if i == 2:
                raise ValueError("no more")
            optimizer.step()
    assert globals_of_torch() == before
    assert seen.report is not None
    assert seen.report.iterations == 2
    assert [f.code for f in seen.report.findings if f.severity == "error"] == ["LRN201"]


def test_an_optimizer_of_layers_that_are_gone_is_not_called_clean() -> None:
    gc.collect()  # models of other tests, which are in memory as any other model would be
    torch.manual_seed(0)
    judge = nn.Linear(1, 1)  # trainable, reached by gradients, and nobody's business
    with ln.observe(steps=2) as seen:
        model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
        model[1] = nn.Linear(4, 1)
        for _ in range(4):
            plain(model, optimizer, torch.randn(8, 4))
    assert seen.report is not None
    assert [f.where for f in seen.report.findings if f.code == "LRN201"] == [["1.weight", "1.bias"]]
    with ln.observe(steps=2) as seen:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            judge(model(torch.randn(8, 4))).square().mean().backward()
            optimizer.step()
    assert seen.report is not None
    assert seen.report.ok, seen.report


def test_a_copy_of_the_model_takes_no_part() -> None:
    torch.manual_seed(0)
    with ln.observe(steps=2) as seen:
        model = nn.Linear(4, 1)
        average = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            plain(model, optimizer, torch.randn(8, 4))
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
    assert seen.report is not None
    assert seen.report.ok, seen.report


@pytest.mark.parametrize("cut", [False, True])
def test_optimizers_that_step_inside_the_backward_share_its_iteration(cut: bool) -> None:
    torch.manual_seed(0)
    with ln.observe(steps=3) as seen:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
        if cut:
            model[1].register_forward_hook(lambda module, args, out: out.detach())
        of = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

        def update(p: Tensor) -> None:
            of[p].step()
            of[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(update)
        for _ in range(6):
            model(torch.randn(8, 4)).square().mean().backward()
    assert seen.report is not None
    assert seen.report.iterations == 3
    errors = [(f.code, f.where) for f in seen.report.findings if f.severity != "note"]
    assert errors == ([("LRN301", ["0.weight", "0.bias"])] if cut else [])
