import re

import pytest
import torch
from torch import nn

import learnables as ln
from learnables.entries import entries
from learnables.errors import SelectionError
from learnables.select import select


def model() -> nn.Module:
    m = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    m.prompt = ln.parameter(1, 2, tags=["prompt"])
    return m


def names(selector, m: nn.Module | None = None) -> list[str]:
    return [entry.name for entry in select(entries(m or model()), selector)]


def test_every_form_of_a_selector() -> None:
    m = model()
    assert names("0.*") == ["0.weight", "0.bias"]
    assert names("prompt") == ["prompt"]
    assert names("tag:prompt") == ["prompt"]
    assert names(re.compile(r"bias$")) == ["0.bias", "1.bias"]
    assert names(nn.LayerNorm) == ["1.weight", "1.bias"]
    assert names(m[0].weight, m) == ["0.weight"]
    assert names(lambda entry: entry.param.ndim == 2) == ["prompt", "0.weight"]
    assert names(["*.weight", "prompt", "!1.*"]) == ["prompt", "0.weight"]


def test_wrappers_do_not_change_what_a_glob_means() -> None:
    wrapped = torch.compile(model())
    assert names("0.*", wrapped) == ["_orig_mod.0.weight", "_orig_mod.0.bias"]
    assert names("_orig_mod.0.*", wrapped) == ["_orig_mod.0.weight", "_orig_mod.0.bias"]


@pytest.mark.parametrize(
    "selector", ["promt", nn.Conv2d, re.compile("x"), nn.Parameter(torch.ones(1)), [], ["!*"]]
)
def test_an_empty_pick_is_an_error_in_five_parts(selector) -> None:
    with pytest.raises(SelectionError, match=r"found: (.|\n)*wanted: (.|\n)*mend: "):
        names(selector)


def test_a_generator_is_not_spent_by_the_first_parameter() -> None:
    found = entries(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    names = ["1.weight", "0.bias"]
    assert select(found, (name for name in names)) == select(found, names)
