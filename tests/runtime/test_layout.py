"""Memory is laid out row-major, in place, and the values stay."""

import copy

import pytest
import torch
from torch import nn

from learnables.runtime.layout import canonicalize_

LAYOUTS = {
    "column-major": lambda w: w.t().contiguous().t(),
    "every second column": lambda w: torch.stack([w, w], dim=-1).flatten(1)[:, ::2],
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 24).reshape(4, 6)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_repaired_model_steps_bit_equal_to_one_that_was_never_strided(layout) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 5)
    strided = copy.deepcopy(plain)
    ours = torch.optim.AdamW(strided.parameters(), fused=True)
    theirs = torch.optim.AdamW(plain.parameters(), fused=True)
    step(strided, ours)
    step(plain, theirs)
    weight = strided.weight
    before = weight.detach().clone()
    weight.data = layout(weight.data)
    ours.state[weight]["exp_avg"] = layout(ours.state[weight]["exp_avg"])
    assert canonicalize_(strided, ours) == ["weight"]
    assert strided.weight is weight
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=0)
    for _ in range(3):
        step(strided, ours)
        step(plain, theirs)
    torch.testing.assert_close(strided.weight, plain.weight, rtol=0, atol=0)
    assert ours.state[weight]["exp_avg"].stride() == weight.stride()


def test_without_repair_the_fused_step_is_wrong() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 5)
    strided = copy.deepcopy(plain)
    ours = torch.optim.AdamW(strided.parameters(), fused=True, lr=0.1)
    theirs = torch.optim.AdamW(plain.parameters(), fused=True, lr=0.1)
    strided.weight.data = LAYOUTS["every second column"](strided.weight.data)
    step(strided, ours)
    step(plain, theirs)
    assert not torch.allclose(strided.weight, plain.weight)


def test_odd_strides_of_dimensions_of_size_1_are_mended() -> None:
    model = nn.Module()
    model.token = nn.Parameter(torch.zeros(8).as_strided((1, 1, 8), (1, 1, 1)))
    assert canonicalize_(model) == ["token"]
    assert model.token.stride() == (8, 8, 1)
    assert canonicalize_(model) == []


def test_state_that_kept_old_strides_under_channels_last_is_mended() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3)
    turned = copy.deepcopy(plain)
    ours = torch.optim.AdamW(turned.parameters(), fused=True, lr=0.1)
    theirs = torch.optim.AdamW(plain.parameters(), fused=True, lr=0.1)
    images = torch.linspace(-1, 1, 75).reshape(1, 3, 5, 5)
    for time in range(4):
        for model, optimizer in ((turned, ours), (plain, theirs)):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
        if time == 0:
            turned.to(memory_format=torch.channels_last)
            assert canonicalize_(turned, ours) == ["weight"]
    torch.testing.assert_close(turned.weight, plain.weight, rtol=0, atol=0)
