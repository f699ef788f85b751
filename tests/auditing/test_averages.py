"""LRN642 on averages as people keep them: torch's, by hand, as a state dict; and look-alikes."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
)

import learnables as ln

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.fc(x) * self.gamma


def by_torch(model, dtype, decay):
    together = dtype is next(model.parameters()).dtype
    way = (
        {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
        if together
        else {"avg_fn": get_ema_avg_fn(decay)}
    )
    average = AveragedModel(model, **way).to(dtype)
    average.n_averaged += 1  # the first update copies
    return average, lambda: average.update_parameters(model)


def of_equal_weight(model, dtype, decay):
    together = dtype is next(model.parameters()).dtype
    average = AveragedModel(model, **({} if together else {"avg_fn": get_swa_avg_fn()})).to(dtype)
    average.n_averaged += round(1 / (1 - decay))
    return average, lambda: average.update_parameters(model)


def by_hand(model, dtype, decay):
    average = copy.deepcopy(model).to(dtype).requires_grad_(False)

    def update():
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                mine.mul_(decay).add_(theirs, alpha=1 - decay)

    return average, update


def as_a_dict(model, dtype, decay):
    average = {k: v.detach().to(dtype, copy=True) for k, v in model.state_dict().items()}

    def update():
        for name, theirs in model.state_dict().items():
            average[name].lerp_(theirs.to(dtype), 1 - decay)

    return average, update


KEEPERS = {f.__name__: f for f in (by_torch, of_equal_weight, by_hand, as_a_dict)}


def audited(keep, dtype, decay=0.999, model_dtype=BF16, updates=True):
    model = Scaled().to(model_dtype)
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-2, weight_decay=0.0))
    if model_dtype is not FP32:
        ln.attach(model, optimizer, rounding="kahan")
    average, update = keep(model, dtype, decay)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(model_dtype)

    def step():
        optimizer.zero_grad()
        loss = (model(x).float() + 1).square().mean()
        loss.backward()
        optimizer.step()
        if updates:
            update()
        else:
            assert average is not None
        return loss

    return ln.audit(model, optimizer, step, copies={"ema": average})


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS)
def test_an_average_that_rounds_away_is_found_and_its_float32_twin_is_not(keep, dtype):
    report = audited(keep, dtype, model_dtype=dtype)
    (finding,) = (f for f in report.findings if f.code == "LRN642")
    assert "gamma" in finding.where
    assert str(dtype).removeprefix("torch.") in finding.what
    assert finding.found.startswith("ema: of ")
    for model_dtype in (dtype, FP32):
        healthy = audited(keep, FP32, model_dtype=model_dtype)
        assert not healthy.findings, healthy  # nor is the average taken for an activation


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS)
def test_an_average_that_nobody_hands_over_is_found_in_the_step(keep):
    """As ``learnables run`` meets it; a dict that the step closes over is found by no name."""
    if keep is as_a_dict:
        pytest.skip("what a dict in a closure is for nobody can know: hand it over as copies=")
    model = Scaled().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    average, update = keep(model, BF16, 0.999)

    def step():
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 4, dtype=BF16)).float() + 1).square().mean()
        loss.backward()
        optimizer.step()
        update()
        assert average is not None
        return loss

    assert "LRN642" in ln.audit(model, optimizer, step).codes


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS)
def test_a_snapshot_that_is_meant_to_stay_is_not_accused(keep):
    assert "LRN642" not in audited(keep, BF16, updates=False).codes


@pytest.mark.parametrize("keep", [by_hand, as_a_dict], ids=["by_hand", "as_a_dict"])
def test_an_average_that_follows_closely_is_not_accused(keep):
    assert "LRN642" not in audited(keep, BF16, decay=0.1).codes
