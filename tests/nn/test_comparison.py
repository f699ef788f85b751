import pytest
from typer.testing import CliRunner

from learnables.cli import app
from learnables.errors import LayoutError
from learnables.nn.comparison import Comparison, Row, compare


def test_every_kind_of_layer_is_measured_against_the_dense_one() -> None:
    found = compare(128, 64, 16, block=16, densities=(0.25, 1.0), seconds=0.01)
    assert [row.layer for row in found.rows] == [
        "dense",
        "block-sparse, density 0.25",
        "low rank, rank 11",
        "block-sparse, density 1",
        "dynamic, 8 bases",
        "dynamic, rank 8",
    ]
    assert [row.values for row in found.rows][:4] == pytest.approx([1, 0.25, 11 * 192 / 8192, 1])
    assert all(row.time > 0 and row.milliseconds > 0 for row in found.rows)
    assert "128 -> 64, batch 16, block 16, torch.float32 on cpu, 1 threads" in str(found)


def test_the_advice_follows_from_the_numbers() -> None:
    rows = (
        Row("dense", 1, 1, 5),
        Row("block-sparse, density 0.1", 0.1, 0.2, 1),
        Row("low rank, rank 5", 0.1, 0.15, 1),
    )
    assert "up to density 0.1" in Comparison(rows, 0.1, "here").advice[0]
    assert "1 of 1" in Comparison(rows, 0.1, "here").advice[1]
    assert "no time at any density" in Comparison(rows, 0.0, "here").advice[0]


def test_the_command_prints_it_and_refuses_what_cannot_be_measured() -> None:
    sizes = ["--in", "64", "--out", "64", "--batch", "4", "--block", "16", "--seconds", "0.01"]
    done = CliRunner().invoke(app, ["bench", "sparse", *sizes])
    assert done.exit_code == 0, done.output
    assert "block-sparse, density 0.5" in done.output
    assert "64 -> 64, batch 4" in done.output
    bad = CliRunner().invoke(app, ["bench", "sparse", *sizes, "--dtype", "int8"])
    assert bad.exit_code == 2
    too_large = CliRunner().invoke(app, ["bench", "sparse", "--in", "32", "--out", "32"])
    assert too_large.exit_code == 2
    with pytest.raises(LayoutError):
        compare(32, 32, 4, block=64)
