import io
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from learnables.errors import ShapeError
from learnables.nn.positions import Positions2d
from learnables.nn.resample import ResampleGrid, resample_grid

GOLDENS = Path(__file__).parents[1] / "goldens"
MAKER = runpy.run_path(str(GOLDENS / "position_table.py"))


@pytest.mark.parametrize("name", MAKER["CASES"])
def test_resampling_equals_timm(name: str) -> None:
    source, target, prefix = MAKER["CASES"][name]
    ours = resample_grid(MAKER["table"](source, prefix), source, target, prefix=prefix)
    theirs = load_file(GOLDENS / "position_table.safetensors")[name]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_plain_load_state_dict_resamples_as_timm_does() -> None:
    big, small = Positions2d(37, 4, prefix=1), Positions2d((16, 24), 4, prefix=1)
    with torch.no_grad():
        big.table.copy_(MAKER["table"]((37, 37), 1))
    state = {"table": big.state_dict()["table"]}  # bare tensors, as safetensors gives them
    small.load_state_dict(state)
    theirs = load_file(GOLDENS / "position_table.safetensors")["37x37_16x24_1"]
    torch.testing.assert_close(small.table.data, theirs, atol=1e-5, rtol=0)


def test_half_precision_is_resampled_in_fp32_and_rounded_once() -> None:
    table = MAKER["table"]((9, 9), 0).bfloat16()
    wanted = resample_grid(table.float(), (9, 9), (4, 6)).bfloat16()
    torch.testing.assert_close(resample_grid(table, (9, 9), (4, 6)), wanted, rtol=0, atol=0)


def test_prefix_rows_are_kept_bit_by_bit() -> None:
    table = MAKER["table"]((6, 6), 3)
    assert torch.equal(resample_grid(table, (6, 6), (9, 2), prefix=3)[:, :3], table[:, :3])


def test_grid_of_equal_size_but_other_form_is_resampled_by_the_metadata() -> None:
    square, flat = Positions2d(8, 4), Positions2d((4, 16), 4)
    flat.load_state_dict(square.state_dict())
    wanted = resample_grid(square.table.detach(), (8, 8), (4, 16))
    torch.testing.assert_close(flat.table.detach(), wanted)


def test_the_grid_travels_through_torch_save_and_through_a_parent_module() -> None:
    def model(grid: tuple[int, int]) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), Positions2d(grid, 4))

    first, second, file = model((2, 9)), model((3, 6)), io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    wanted = resample_grid(first[1].table.detach(), (2, 9), (3, 6))
    torch.testing.assert_close(second[1].table.detach(), wanted)


@pytest.mark.parametrize(
    ("rows", "grid", "guessed"),
    [(64, (4, 16), (8, 8)), (72, (6, 3), (12, 6)), (96, (16, 24), (8, 12)), (50, (4, 4), None)],
)
def test_without_metadata_the_source_is_square_or_of_the_same_aspect_ratio(
    rows: int, grid: tuple[int, int], guessed: tuple[int, int] | None
) -> None:
    assert ResampleGrid(grid)._guess(rows) == guessed


def test_a_source_that_cannot_be_told_says_how_to_tell_it() -> None:
    state = {"table": torch.zeros(1, 50, 4)}
    with pytest.raises(ShapeError, match="source_grid"):
        Positions2d(4, 4).load_state_dict(state)
    told = Positions2d(4, 4, source_grid=(5, 10))
    told.load_state_dict(state)
    assert told.table.abs().max() == 0


def test_another_width_is_refused() -> None:
    with pytest.raises(ShapeError, match="not its width"):
        Positions2d(4, 4).load_state_dict({"table": torch.zeros(1, 9, 8)})


def test_forward_adds_the_table_and_keeps_the_dtype() -> None:
    positions, x = Positions2d((2, 3), 4, prefix=1), torch.randn(5, 7, 4, dtype=torch.bfloat16)
    torch.testing.assert_close(positions(x), x + positions.table.bfloat16())


def test_forward_on_another_grid_resamples_on_the_way() -> None:
    positions, x = Positions2d(4, 8, prefix=1), torch.zeros(1, 1 + 2 * 6, 8)
    wanted = resample_grid(positions.table, (4, 4), (2, 6), prefix=1)
    torch.testing.assert_close(positions(x, grid=(2, 6)), wanted)


def test_forward_refuses_another_number_of_tokens() -> None:
    with pytest.raises(ShapeError, match="17: 1 prefix"):
        Positions2d(4, 8, prefix=1)(torch.zeros(1, 16, 8))
