import pytest
import torch
from tests.handwritten import Handwritten
from torch import nn

import learnables as ln
from learnables.errors import ArgumentError, PolicyError, SelectionError


def test_every_parameter_once_with_all_its_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    rows = ln.inventory(model)
    assert [row.name for row in rows] == ["a.weight", "a.bias", "b.bias"]
    assert rows["b.weight"] is rows["a.weight"]
    assert "= b.weight" in str(rows)


def test_why_names_the_line_of_the_strongest_statement() -> None:
    model = nn.Module()
    model.mix = ln.parameter(3, 3, lr_scale=2.0)
    assert any("lr_scale=2.0 by ln.parameter" in line for line in ln.inventory(model)["mix"].why)
    ln.annotate(model, "mix", lr_scale=3.0)
    assert ln.inventory(model)["mix"].lr_scale == 3.0
    plan = ln.inventory(model, {"mix": {"lr_scale": 4.0}})["mix"]
    assert plan.lr_scale == 4.0
    assert "policy=" in plan.why[1]
    assert "test_table.py" in plan.why[1]


def test_two_annotations_that_disagree_name_both_lines_and_change_nothing() -> None:
    model = nn.Linear(2, 2)
    ln.annotate(model, "*", lr_scale=2.0)
    with pytest.raises(PolicyError, match=r"disagree(.|\n)*test_table.py:\d+(.|\n)*test_table.py:"):
        ln.annotate(model, "bias", lr_scale=3.0)
    assert ln.inventory(model)["bias"].lr_scale == 2.0


def test_overlapping_policies_that_disagree_name_both() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(PolicyError, match=r"'\*'(.|\n)*'bias'"):
        ln.inventory(model, {"*": {"weight_decay": True}, "bias": {"weight_decay": False}})


def test_a_tie_of_two_declarations_that_disagree_is_an_error() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["a"].weight = ln.parameter(2, 2, lr_scale=2.0)
    model["b"].weight = ln.parameter(2, 2, lr_scale=3.0)
    model["b"].weight = model["a"].weight
    with pytest.raises(PolicyError, match=r"where: a.weight, b.weight"):
        ln.inventory(model)
    assert ln.inventory(model, {"a.weight": {"lr_scale": 1.0}})["a.weight"].lr_scale == 1.0


def test_the_same_line_run_twice_is_one_annotation() -> None:
    model = nn.Linear(2, 2)
    for scale in (2.0, 3.0):  # as a notebook cell that is edited and run again
        ln.annotate(model, "bias", lr_scale=scale)
    assert ln.inventory(model)["bias"].lr_scale == 3.0


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(SelectionError, match=r"'blocks\.0\.gamma'"):
        ln.annotate(Handwritten(), "blocks.0.gama", weight_decay=False)
    inventory = ln.inventory(Handwritten())
    with pytest.raises(SelectionError, match=r"where: blocks.0.gama\n[\s\S]*'blocks\.0\.gamma'"):
        inventory["blocks.0.gama"]
    for wrong in (None, slice(0, 2), ("blocks.0.gamma",)):
        with pytest.raises(ArgumentError, match="where: key"):
            inventory[wrong]
    with pytest.raises(IndexError):
        inventory[len(inventory)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_decay", -0.1),
        ("weight_decay", "zero"),
        ("lr_scale", float("nan")),
        ("lr_scale", True),
        ("compute_dtype", torch.int64),
        ("constraint", 3),
        ("role", "lineer"),
        ("wieght_decay", 0.1),
    ],
)
def test_a_field_that_means_nothing_is_refused(field: str, value: object) -> None:
    with pytest.raises(PolicyError, match="wanted: "):
        ln.annotate(nn.Linear(2, 2), "*", **{field: value})


def test_the_table_fits_80_columns_and_shows_hostile_names_as_text(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model = Handwritten()
    model.register_parameter("evil\x1b[31m\nname", nn.Parameter(torch.zeros(2)))
    text = str(ln.inventory(model))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "26 parameters" in text


def test_counts() -> None:
    model = Handwritten()
    model.head.requires_grad_(False)
    counts = ln.inventory(model).counts
    assert counts["parameters"] == 25
    assert counts["trainable"] == 23
    assert counts["decayed"] == 2
    assert counts["values"] == sum(p.numel() for p in model.parameters())
