"""LRN711: the running statistics of what is frozen stay as they are."""

import pytest
import torch
from torch import nn

import learnables as ln


def net(norm=nn.BatchNorm1d, **options) -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 4), norm(4, **options), nn.ReLU())
    return nn.Sequential(body, nn.Linear(4, 1))


def stepping(model, optimizer):
    """A function that trains ``model`` for one step."""

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(16, 4)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


def accused(model: nn.Sequential) -> list[str]:
    """Names of LRN711 after two steps, and that it is right about what moves."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    norm, step = model[0][1], stepping(model, optimizer)
    before = norm.running_mean.clone() if norm.running_mean is not None else None
    for _ in range(2):
        step()
    moved = before is not None and not torch.equal(before, norm.running_mean)
    report = ln.audit(model, optimizer, step=step, select=["LRN711"])
    names = [name for finding in report.findings for name in finding.where]
    frozen = not any(p.requires_grad for p in model[0].parameters())
    assert bool(names) == (moved and frozen)
    return names


@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=["affine", "not affine"])
def test_a_frozen_norm_in_training_mode_is_named(options):
    model = net(**options)
    model[0].requires_grad_(False)
    assert accused(model) == ["0.1.running_mean"]


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"track_running_stats": False}])
def test_statistics_that_do_not_move_are_not(options):
    model = net(**options)
    model[0].requires_grad_(False)
    assert accused(model) == []


def test_a_norm_that_trains_is_not():
    assert accused(net()) == []


@pytest.mark.parametrize("rounds", [1, 4])
def test_two_networks_that_train_in_turns_are_not(rounds):
    """As in a GAN: each is switched off while the other trains, here for ``rounds`` steps."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": net(), "second": net()})
    optimizers = {name: torch.optim.SGD(part.parameters(), lr=0.1) for name, part in model.items()}
    turn = 0

    def step():
        nonlocal turn
        chosen = ("first", "second")[turn // rounds % 2]
        turn += 1
        for name, part in model.items():
            part.requires_grad_(name == chosen)
        optimizers[chosen].zero_grad()
        loss = sum(part(torch.randn(16, 4)).square().mean() for part in model.values())
        loss.backward()
        optimizers[chosen].step()
        return loss

    step()
    report = ln.audit(model, list(optimizers.values()), step=step, steps=4, select=["LRN711"])
    assert not report.findings


def test_frozen_and_handed_to_the_optimizer_all_the_same_is_named():
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = stepping(model, optimizer)
    (finding,) = ln.audit(model, optimizer, step=step, select=["LRN711"]).findings
    assert list(finding.where) == ["0.1.running_mean"]


@pytest.mark.parametrize(("frozen", "severity"), [([], "note"), (["0.*"], "warning")])
def test_it_is_a_warning_where_the_module_was_meant_to_stay(frozen, severity):
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    step = stepping(model, optimizer)
    intent = ln.Intent(frozen=frozen)
    (finding,) = ln.audit(model, optimizer, step=step, intent=intent, select=["LRN711"]).findings
    assert finding.severity == severity


def test_what_freeze_and_train_only_do_passes():
    model = net()
    ln.freeze(model, "0.*")
    model.train()
    assert accused(model) == []
    model = net()
    ln.train_only(model, "1.*")
    model.train()
    assert accused(model) == []


def test_what_the_finding_says_to_type_mends_it():
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    step = stepping(model, optimizer)
    (finding,) = ln.audit(model, optimizer, step=step, select=["LRN711"]).findings
    eval(finding.mend, {"ln": ln, "model": model})
    model.train()
    assert accused(model) == []
