"""Layouts are timed beside the noise of the measuring, and nothing below it is called a finding."""

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from learnables.cli import app
from learnables.runtime.layout_comparison import (
    LayoutComparison,
    LayoutRow,
    Ratio,
    _of_a_kernel,
    _of_a_matrix,
    compare_layouts,
)


def test_a_matrix_is_measured_in_four_ways_of_which_the_first_is_noise() -> None:
    found = compare_layouts(24, 16, 8, seconds=0.01)
    assert [row.layout for row in found.rows] == [
        "F.linear, row-major: itself again",
        "F.linear, column-major",
        "x @ weight, row-major",
        "x @ weight, column-major",
    ]
    for row in found.rows:
        for ratio in (row.forward, row.training):
            assert 0 < ratio.low <= ratio.median <= ratio.high
            assert ratio.pairs >= 3
    assert "24 -> 16, batch 8, torch.float32 on cpu, 1 threads" in str(found)


@pytest.mark.parametrize(
    "tasks",
    [
        _of_a_matrix(torch.randn(6, 5), torch.randn(4, 5)),
        _of_a_kernel(torch.randn(6, 5, 3, 3), torch.randn(4, 5, 7, 7)),
    ],
    ids=["matrix", "kernel"],
)
def test_all_ways_compute_the_same_and_no_two_lie_alike(tasks) -> None:
    results = [product(x, w).detach() for product, w, x in tasks.values()]
    for result in results:
        torch.testing.assert_close(result, results[0])
    lies = {(product, w.stride(), x.stride()) for product, w, x in tasks.values()}
    assert len(lies) == 4
    assert {product for product, _, _ in lies} <= {F.linear, torch.matmul, F.conv2d}


def row(layout: str, forward: float, training: float, spread: float = 0.01) -> LayoutRow:
    ratios = (Ratio(m, m - spread, m + spread, 50) for m in (forward, training))
    return LayoutRow(layout, *ratios)


def test_only_what_is_larger_than_the_noise_is_said() -> None:
    calm, restless = row("same", 1.0, 1.0), row("same", 1.0, 1.0, spread=0.2)
    slow, quick = row("slow", 1.5, 1.1), row("quick", 0.8, 1.0)
    said = LayoutComparison((calm, slow, quick), "here").advice
    assert said[:3] == (
        "slow: 1.50 times as long in forward.",
        "slow: 1.10 times as long in training.",
        "quick: 0.80 times as long in forward.",
    )
    assert "2% forward" in said[3]
    said = LayoutComparison((restless, slow, quick), "here").advice
    assert said[0] == "slow: 1.50 times as long in forward."
    assert len(said) == 2
    assert "25% forward" in said[1]
    (nothing,) = LayoutComparison((calm, row("alike", 1.01, 0.99, 0.001)), "here").advice
    assert "leave it row-major" in nothing
    unsure = row("unsure", 1.2, 1.2, spread=0.19)
    assert "leave it row-major" in LayoutComparison((calm, unsure), "here").advice[0]


def test_a_real_difference_is_found() -> None:
    """Of two tasks of which one does its work three times; a twin of the timing itself."""
    from learnables.nn.comparison import paired
    from learnables.runtime.layout_comparison import _ratio

    x = torch.randn(96, 96)
    once = lambda: x @ x  # noqa: E731
    thrice = lambda: [x @ x for _ in range(3)]  # noqa: E731
    assert 2 < _ratio(paired(once, thrice, torch.device("cpu"), 0.3)).median < 4.5


def test_the_command_prints_it_and_refuses_what_cannot_be_measured() -> None:
    quick = ["bench", "layout", "--in", "8", "--out", "8", "--batch", "2", "--seconds", "0.01"]
    done = CliRunner().invoke(app, [*quick, "--kernel", "3", "--side", "6", "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert "conv2d, both channels last" in done.output
    assert "noise" in done.output
    for bad in (["--dtype", "int8"], ["--kernel", "9", "--side", "8"]):
        assert CliRunner().invoke(app, [*quick, *bad]).exit_code == 2
