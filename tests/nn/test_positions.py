import io
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import learnables as ln
from learnables.errors import ShapeError
from learnables.nn import (
    FactorizedPositions,
    FramePositions,
    LevelEmbedding,
    Positions1d,
    Positions2d,
)
from learnables.nn.resample import _square_or_like, resample_grid

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
    assert _square_or_like(rows, grid) == guessed


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


def test_a_line_of_positions_is_sliced_and_can_start_later() -> None:
    positions, x = Positions1d(9, 4), torch.randn(2, 5, 4)
    torch.testing.assert_close(positions(x), x + positions.table[:, :5])
    torch.testing.assert_close(positions(x, start=3), x + positions.table[:, 3:8])
    for start in (5, -1):
        with pytest.raises(ShapeError, match="at most 9"):
            positions(x, start=start)


@pytest.mark.parametrize(
    ("make", "name", "dim"),
    [
        (lambda n: Positions1d(n, 4), "table", 1),
        (lambda n: FramePositions(n, 4), "table", 0),
        (lambda n: FactorizedPositions((n, 3), 4), "rows", 0),
        (lambda n: FactorizedPositions((3, n), 4), "columns", 0),
    ],
)
@pytest.mark.parametrize("sizes", [(12, 5), (5, 12)])
def test_another_length_is_resampled_along_its_axis(make, name, dim, sizes) -> None:
    source, target = make(sizes[0]), make(sizes[1])
    target.load_state_dict(source.state_dict())
    value = source.get_parameter(name).detach().movedim(dim, 0).reshape(sizes[0], -1)
    slow = F.interpolate(
        value.T[None, :, :, None], size=(sizes[1], 1), mode="bicubic", antialias=True
    )[0, :, :, 0].T
    found = target.get_parameter(name).detach().movedim(dim, 0).reshape(sizes[1], -1)
    torch.testing.assert_close(found, slow)


def test_a_constant_line_stays_constant_whatever_its_length() -> None:
    source, target = Positions1d(7, 3, init=ln.init.ones()), Positions1d(20, 3)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target.table.detach(), torch.ones(1, 20, 3))


def test_rows_and_columns_are_added_place_by_place() -> None:
    positions, x = FactorizedPositions((4, 5), 3, prefix=1), torch.randn(2, 1 + 6, 3)
    y = positions(x, grid=(2, 3))
    assert torch.equal(y[:, 0], x[:, 0])
    for place in range(6):
        wanted = x[:, 1 + place] + positions.rows[place // 3] + positions.columns[place % 3]
        torch.testing.assert_close(y[:, 1 + place], wanted)
    for grid in ((2, 2), (5, 3)):
        with pytest.raises(ShapeError, match="fill the grid"):
            positions(x, grid=grid)


def test_frames_get_one_vector_each() -> None:
    positions, x = FramePositions(5, 3), torch.randn(2, 4, 6, 3)
    y = positions(x)
    for frame in range(4):
        torch.testing.assert_close(y[:, frame], x[:, frame] + positions.table[frame])
    flat = torch.randn(2, 4, 3)
    torch.testing.assert_close(positions(flat), flat + positions.table[:4])
    with pytest.raises(ShapeError, match="at most 5"):
        positions(torch.zeros(2, 6, 1, 3))


def test_levels_are_added_by_number_or_by_index() -> None:
    levels, x = LevelEmbedding(3, 4), torch.randn(2, 5, 4)
    torch.testing.assert_close(levels(x, 2), x + levels.table[2])
    index = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 2, 0, 0]])
    torch.testing.assert_close(levels(x, index), x + levels.table[index])
    more = LevelEmbedding(5, 4)
    more.load_state_dict(levels.state_dict())
    assert torch.equal(more.table[:3], levels.table)
    assert more.table[3:].abs().max() > 0
