"""What the layout rules find of what goes wrong, in a generated matrix, and what they cost.

Each cell of the matrix is a layout, an optimizer, a way to compute its step, and one process or
DDP; whether training goes wrong in it is measured, see tests/layouts.py. The cost is that of the
rules alone, per parameter, on a model of 200 layers.

    python benchmarks/layout.py
"""

import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from environment import save
from torch import nn

from learnables.auditing.evidence import Evidence, Look, Stage
from learnables.auditing.rule import load_rules
from learnables.auditing.survey import Survey
from learnables.entries import entries

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.gloo import one_process_group
from tests.layouts import (
    CONSUMERS,
    FUSED,
    LAYOUTS,
    OPTIMIZERS,
    OURS,
    WAYS,
    Cell,
    cells,
    expanded,
    judge,
    refusals,
    repaired,
    truth,
    windows,
)

LOOK = Look(True, True, 1, None, None, True, 0.1, None, {}, True)


def counted(matrix: list[Cell]) -> dict[str, Any]:
    """How many cells go wrong or are complained of by torch, and how many the audit misjudges."""
    wrong = told = 0
    missed, false = [], []
    for cell in matrix:
        happened = truth(cell)
        wrong += happened.wrong
        told += happened.told and not happened.wrong
        if judge(cell):
            (missed if happened.wrong or happened.told else false).append(str(cell))
    return {
        "cells": len(matrix),
        "training goes wrong": wrong,
        "torch warns": told,
        "missed": len(missed),
        "false": len(false),
    }


def repairs() -> dict[str, Any]:
    """Fused cells that go wrong, trained again with ``canonicalize_`` before each step."""
    spoiled = [
        cell
        for layout in LAYOUTS
        for optimizer in FUSED
        if LAYOUTS[layout].make not in (windows, expanded)
        and truth(cell := Cell(layout, optimizer, "fused")).wrong
    ]
    values = [repaired(cell) for cell in spoiled]
    fused = [cell.twin("fused") for cell in spoiled]
    loops = [cell.twin("loop") for cell in spoiled]
    pairs = list(zip(values, loops, strict=True))
    return {
        "fused cells that go wrong": len(spoiled),
        "bit-equal to row-major, fused": sum(map(torch.equal, values, fused)),
        "bit-equal to row-major, not fused": sum(map(torch.equal, values, loops)),
        "largest relative distance from not fused": max(
            float((a - b).abs().max() / b.abs().max()) for a, b in pairs
        ),
    }


def refused() -> dict[str, Any]:
    """Consumer → layouts that it refuses, how many of them are not told, how many told falsely."""
    found: dict[str, dict[str, int]] = {
        name: {"layouts": len(LAYOUTS), "refused": 0, "missed": 0, "false": 0} for name in CONSUMERS
    }
    for layout in LAYOUTS:
        for name, (refuses, named, loud) in refusals(layout).items():
            found[name]["refused"] += refuses
            found[name]["missed"] += refuses and not (named or loud)
            found[name]["false"] += named and not refuses
    return found


def cost() -> float:
    """Microseconds per parameter, all rules about strides together, best of 20."""
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(200)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    walk = entries(model)
    seen = Survey(model).add_optimizer(optimizer, "optimizer", given=True)
    looks = {
        entry: (replace(LOOK, consumed_strides=tuple(entry.param.stride())),) * 4 for entry in walk
    }
    rules = [r for r in load_rules().values() if r.code.startswith(OURS)]
    best = float("inf")
    for _ in range(20):
        evidence = Evidence(Stage.STEP, model, walk, optimizers=(seen,), looks=looks)
        start = time.process_time()
        assert [found for rule in rules for found in rule.check(evidence)] == []
        best = min(best, time.process_time() - start)
    return best / len(walk) * 1e6


def main() -> None:
    torch.set_num_threads(1)
    # DDP's warning comes from C++ in every step of every cell that earns it
    warnings.simplefilter("ignore")
    rows: dict[str, Any] = {"one process": counted(cells(list(OPTIMIZERS)))}
    with one_process_group():
        rows["DDP"] = counted(cells(list(OPTIMIZERS), ddp=True))
        rows["refused"] = refused()
    rows["repaired"] = repairs()
    rows["microseconds per parameter"] = cost()
    for name in ("one process", "DDP", "repaired"):
        print(f"{name}: " + "; ".join(f"{key} {value:.6g}" for key, value in rows[name].items()))
    for name, row in rows["refused"].items():
        print(f"refused by {name}: " + "; ".join(f"{key} {value}" for key, value in row.items()))
    print(f"{len(LAYOUTS)} layouts × {len(OPTIMIZERS)} optimizers × {', '.join(WAYS)}")
    print(f"all rules together: {rows['microseconds per parameter']:.1f} µs per parameter")
    print(save("layout", rows, layouts=list(LAYOUTS), optimizers=list(OPTIMIZERS)))


if __name__ == "__main__":
    main()
