"""The layout rules against what really happens, on a generated matrix of layouts and optimizers."""

import json
from pathlib import Path

import pytest
import torch
from tests.gloo import one_process_group, spawn
from tests.layouts import (
    LAYOUTS,
    OPTIMIZERS,
    Cell,
    cells,
    expanded,
    judge,
    refusals,
    repaired,
    truth,
    windows,
)
from torch import nn

import learnables as ln

pytestmark = pytest.mark.filterwarnings("ignore:Grad strides do not match")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


COMMON = ["AdamW", "SGD, momentum", "Adagrad", "RMSprop"]
FEW = [*COMMON, *(pytest.param(o, marks=pytest.mark.slow) for o in OPTIMIZERS if o not in COMMON)]


@pytest.mark.parametrize("optimizer", FEW)
def test_an_error_is_found_exactly_where_training_goes_wrong(optimizer) -> None:
    found = {str(cell): said for cell in cells([optimizer]) if (said := judge(cell))}
    assert found == {}


def test_the_matrix_has_both_kinds_of_cells() -> None:
    wrong = [cell for cell in cells(["AdamW"]) if truth(cell).wrong]
    assert 10 < len(wrong) < len(cells(["AdamW"])) / 2
    assert {cell.way for cell in wrong} == {"fused", "foreach", "loop"}


@each_layout
def test_what_a_fused_optimizer_spoils_is_repaired_bit_for_bit(layout) -> None:
    made = LAYOUTS[layout].make
    for optimizer in ("AdamW", "SGD, momentum", "Adagrad"):
        cell = Cell(layout, optimizer, "fused")
        if made in (windows, expanded) or not truth(cell).wrong:
            continue
        value = repaired(cell)
        torch.testing.assert_close(value, cell.twin("fused"), rtol=0, atol=0)
        torch.testing.assert_close(value, cell.twin("loop"), rtol=1e-12, atol=1e-13)


def test_what_overlaps_trains_once_it_is_repaired() -> None:
    for layout, way in (("overlapping windows", "fused"), ("expanded", "loop")):
        assert torch.isfinite(repaired(Cell(layout, "AdamW", way))).all()


def test_under_ddp_a_warning_is_found_exactly_where_torch_warns() -> None:
    with one_process_group():
        found = {cell: judge(cell) for cell in cells(["SGD, momentum"], ddp=True)}
        told = [cell for cell in found if truth(cell).told]
    assert {str(cell): said for cell, said in found.items() if said} == {}
    assert len(told) > 6


@each_layout
def test_who_refuses_a_layout_is_said(layout) -> None:
    with one_process_group():
        found = refusals(layout)
    for consumer, (refused, named, loud) in found.items():
        assert refused <= (named or loud), consumer
        assert named <= refused, consumer


def on_each_of_two_ranks(rank: int) -> None:
    for cell in cells(["AdamW"], ddp=True):
        assert judge(cell) == [], (rank, cell)


def test_two_ranks_judge_alike() -> None:
    spawn(on_each_of_two_ranks, 2)


def test_a_healthy_model_in_channels_last_is_not_accused() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten()
    )
    model.token = nn.Parameter(torch.zeros(1, 8, 1, 1))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        loss = model[:3](images).add(model.token).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    assert ln.audit(model, optimizer, step, select=["LRN6"]).findings == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_prints_what_was_counted(language) -> None:
    root = Path(__file__).parents[2]
    rows = json.loads((root / "benchmarks/results/layout.json").read_text("utf-8"))["rows"]
    page = (root / "docs" / language / "layout.md").read_text("utf-8")
    for name in ("one process", "DDP"):
        n = rows[name]
        told = n["torch warns"] or ""
        cells = (n["cells"], n["training goes wrong"], told, n["missed"], n["false"])
        assert "|" + "|".join(map(str, cells)) + "|" in page.replace(" ", "")
    repaired = rows["repaired"]
    for key in ("fused cells that go wrong", "bit-equal to row-major, not fused"):
        assert f" {repaired[key]} " in page
    assert repaired["bit-equal to row-major, fused"] == repaired["fused cells that go wrong"]
    assert repaired["largest relative distance from not fused"] < 3e-16
    assert [rows["refused"][name]["refused"] for name in ("safetensors", "FSDP2", "DDP")] == [
        15,
        15,
        2,
    ]
    assert rows["microseconds per parameter"] < 5
