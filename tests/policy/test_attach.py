import pytest
import torch
from tests.gloo import spawn
from torch import nn

import learnables as ln
from learnables.errors import PolicyError
from learnables.policy.attach import attachment_of


class Colour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = ln.parameter(torch.eye(3), weight_decay="init", lr_scale=0.5)
        self.bias = ln.parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix + self.bias


def made(optimizer_class=torch.optim.AdamW, **kw):
    model = Colour()
    groups = ln.param_groups(model, lr=0.1, weight_decay=0.5)
    return model, optimizer_class(groups, **kw)


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"fused": True}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.RMSprop, {}),
    ],
)
def test_decay_toward_the_initial_value_is_adamws_decay_moved_to_it(
    optimizer_class, options
) -> None:
    """Slow twin: shift the origin to the initial value, and decay toward zero there by hand."""
    model, optimizer = made(optimizer_class, **options)
    twin, plain = made(optimizer_class, **options)
    for group in plain.param_groups:
        group["weight_decay"] = 0.0
    ln.attach(model, optimizer)
    x = torch.randn(8, 3)
    for _ in range(5):
        for m, o in ((model, optimizer), (twin, plain)):
            o.zero_grad()
            m(x).square().sum().backward()
            if m is twin:
                with torch.no_grad():
                    rate = 0.1 * 0.5 * 0.5
                    m.matrix.copy_(torch.eye(3) + (m.matrix - torch.eye(3)) * (1 - rate))
            o.step()
    torch.testing.assert_close(model.matrix, twin.matrix)
    torch.testing.assert_close(model.bias, twin.bias)


CLOSURES = {
    "SGD": (torch.optim.SGD, {}),
    "AdamW": (torch.optim.AdamW, {}),
    "fused AdamW": (torch.optim.AdamW, {"fused": True}),
    "Rprop": (torch.optim.Rprop, {}),
}


@pytest.mark.parametrize("rounding", [None, "kahan", "master"])
@pytest.mark.parametrize("kind", CLOSURES)
@pytest.mark.parametrize("by_keyword", [False, True])
def test_with_a_closure_it_is_pulled_where_it_is_without(kind, rounding, by_keyword) -> None:
    """From the first step on, at which there is no gradient yet when the step begins."""
    optimizer_class, options = CLOSURES[kind]
    ends = []
    dtype = torch.float64 if rounding is None else torch.bfloat16
    x = torch.randn(8, 3, dtype=dtype)
    for closed in (False, True):
        model = Colour().to(dtype)
        optimizer = optimizer_class(ln.param_groups(model, lr=0.1, weight_decay=0.5), **options)
        handle = ln.attach(model, optimizer, rounding=rounding)
        with torch.no_grad():
            model.matrix += 1

        def evaluate(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        for _ in range(4):
            if closed:
                _ = optimizer.step(closure=evaluate) if by_keyword else optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
        full = handle.full_precision()
        ends.append(full.get("matrix", model.matrix).detach().clone())
    rtol = 1e-12 if rounding is None else 1e-3
    torch.testing.assert_close(ends[1], ends[0], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("evaluations", [1, 6])
def test_lbfgs_is_pulled_once_a_step_however_often_it_evaluates(search, evaluations) -> None:
    """Slow twin: a plain step, and the pull reckoned by hand from where the step began."""

    class Matrix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = ln.parameter(torch.eye(3), weight_decay="init")

    torch.manual_seed(0)
    x = torch.randn(8, 3, dtype=torch.float64)
    y, start, ends, calls = x @ torch.diag(torch.arange(1.0, 4.0)).double(), torch.eye(3), [], []
    for attached in (True, False):
        model = Matrix().double()
        groups = ln.param_groups(model, lr=0.5, weight_decay=0.2)  # one: it takes no more
        options = {"max_iter": evaluations, "line_search_fn": search}
        optimizer = torch.optim.LBFGS(groups, **options)
        if attached:
            ln.attach(model, optimizer)

        def evaluate(model=model, optimizer=optimizer):
            calls.append(1)
            optimizer.zero_grad()
            loss = (x @ model.matrix - y).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            before = model.matrix.detach().clone()
            optimizer.step(evaluate)
            if not attached:
                with torch.no_grad():
                    model.matrix += 0.5 * 0.2 * (start - before)
        ends.append(model.matrix.detach())
    assert len(calls) >= 3 * 2 * evaluations
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-12)
    assert (ends[0] - torch.diag(torch.arange(1.0, 4.0))).abs().max() > 0.05, "pulled at all"


def test_a_parameter_that_a_closure_gives_no_gradient_is_not_pulled() -> None:
    model, optimizer = made()
    ln.attach(model, optimizer)
    with torch.no_grad():
        model.matrix.zero_()
    model.matrix.grad = torch.ones(3, 3)  # of the step before

    def evaluate():
        optimizer.zero_grad()
        model.bias.sum().backward()
        return torch.zeros(())

    optimizer.step(evaluate)
    torch.testing.assert_close(model.matrix.detach(), torch.zeros(3, 3), rtol=0, atol=0)


def test_what_moves_parameters_before_it_evaluates_is_pulled_all_the_same() -> None:
    """As sharpness-aware steps do: they go back to the values that they found."""

    class There(torch.optim.SGD):
        def step(self, closure=None):
            held = [p for group in self.param_groups for p in group["params"]]
            kept = [p.detach().clone() for p in held]
            with torch.no_grad():
                for p in held:
                    p.add_(1.0)
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                for p, value in zip(held, kept, strict=True):
                    p.copy_(value)
            super().step()
            return loss

    model, optimizer = made(There)
    ln.attach(model, optimizer)
    with torch.no_grad():
        model.matrix.zero_()

    def evaluate():
        optimizer.zero_grad()
        (0 * model.matrix.sum()).backward()
        return torch.zeros(())

    optimizer.step(evaluate)
    torch.testing.assert_close(model.matrix.detach(), 0.1 * 0.5 * 0.5 * torch.eye(3))


def test_a_step_that_raised_behind_its_closure_is_not_made_up_for() -> None:
    model, optimizer = made(torch.optim.SGD)
    ln.attach(model, optimizer)

    def evaluate():
        raise RuntimeError("out of memory")

    with torch.no_grad():
        model.matrix.zero_()
    model.matrix.grad = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(evaluate)
    torch.testing.assert_close(model.matrix.detach(), torch.zeros(3, 3), rtol=0, atol=0)
    optimizer.step()
    torch.testing.assert_close(model.matrix.detach(), 0.1 * 0.5 * 0.5 * torch.eye(3))


def test_a_step_that_the_scaler_skips_does_not_decay() -> None:
    for options in ({"fused": True}, {"foreach": True}):
        model, optimizer = made(**options)
        ln.attach(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        with torch.no_grad():
            model.matrix.zero_()
        scaler.scale(model(torch.tensor([[torch.inf, 1.0, 1.0]])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0
        torch.testing.assert_close(model.matrix.detach(), torch.zeros(3, 3))


def test_without_a_gradient_nothing_is_decayed() -> None:
    model, optimizer = made()
    ln.attach(model, optimizer)
    with torch.no_grad():
        model.matrix.zero_()
    optimizer.step()
    torch.testing.assert_close(model.matrix.detach(), torch.zeros(3, 3))


def test_attaching_again_replaces_and_removing_ends_it() -> None:
    model, optimizer = made(torch.optim.SGD)
    first = ln.attach(model, optimizer)
    second = ln.attach(model, optimizer)
    assert attachment_of(optimizer) is second
    assert first is not second
    with torch.no_grad():
        model.matrix.zero_()
    model.matrix.grad = torch.zeros(3, 3)
    optimizer.step()
    torch.testing.assert_close(model.matrix.detach(), 0.025 * torch.eye(3))  # once, not twice
    second.remove()
    optimizer.step()
    torch.testing.assert_close(model.matrix.detach(), 0.025 * torch.eye(3))
    assert attachment_of(optimizer) is None


def test_an_optimizer_that_does_not_hold_it_is_refused_with_the_mend() -> None:
    model = Colour()
    with pytest.raises(PolicyError, match=r"where: matrix(.|\n)*ln.param_groups"):
        ln.attach(model, torch.optim.SGD([model.bias], lr=0.1))
    with pytest.raises(PolicyError, match="without a coefficient"):
        ln.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_unknown_initial_value_is_refused() -> None:
    with torch.device("meta"):
        model = Colour()
    model.to_empty(device="cpu")
    optimizer = torch.optim.SGD(ln.param_groups(model, lr=0.1, weight_decay=0.5))
    with pytest.raises(PolicyError, match=r"not known(.|\n)*reset_"):
        ln.attach(model, optimizer)


def _rank(rank: int) -> None:
    torch.manual_seed(rank)  # each rank draws another initial value; DDP broadcasts the parameter
    model = nn.Module()
    model.mix = ln.parameter(3, 3, init=torch.nn.init.normal_, weight_decay="init")
    model.forward = lambda x: x @ model.mix
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ln.param_groups(ddp, lr=0.1, weight_decay=1.0))
    ln.attach(ddp, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        ddp(torch.ones(1, 3) * (rank + 1)).sum().backward()
        optimizer.step()
    gathered = [torch.empty(3, 3) for _ in range(2)]
    torch.distributed.all_gather(gathered, model.mix.detach())
    torch.testing.assert_close(gathered[0], gathered[1], rtol=0, atol=0)


def test_under_ddp_all_ranks_decay_toward_the_value_of_rank_0() -> None:
    spawn(_rank, 2)


def test_a_loaded_state_dict_decides_at_which_rate_values_are_pulled() -> None:
    model = nn.Module()
    model.colour = ln.parameter(torch.eye(2), weight_decay="init")
    optimizer = torch.optim.SGD(ln.param_groups(model, lr=0.1, weight_decay=0.5))
    ln.attach(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())  # the groups are new dicts now
    for group in optimizer.param_groups:
        group["lr"] = 0.2
    with torch.no_grad():
        model.colour.zero_()
    model.colour.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(model.colour.detach(), 0.2 * 0.5 * torch.eye(2))
