"""What is put right after a conversion: once, in copies too, whoever converts."""

import copy
import pickle

import torch
from torch import nn

from learnables.conversion import after_conversion

calls: list[str] = []


def note(module: nn.Module) -> None:
    calls.append(f"first, {module.weight.dtype}")


def note_too(module: nn.Module) -> None:
    calls.append("second")


def test_each_is_called_once_in_order_when_a_parent_converts() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for function in (note, note_too, note):
        after_conversion(model[1], function)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        one.double()
        assert calls == ["first, torch.float64", "second"]
    assert type(model[1]) is nn.Linear


def test_a_copy_converts_itself_and_not_the_original() -> None:
    model = nn.Linear(2, 2)
    after_conversion(model, note)
    copy.deepcopy(model).to(torch.float64)
    assert model.weight.dtype is torch.float32
