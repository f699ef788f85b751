import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from learnables.errors import ShapeError
from learnables.nn import (
    AttentionBias,
    ContentPositionBias,
    DecomposedRelativeBias,
    RelativeBias,
)

GOLDENS = Path(__file__).parents[1] / "goldens"
MAKER = runpy.run_path(str(GOLDENS / "position_table.py"))
WINDOWS = [(1, 1), (2, 2), (2, 3), (4, 1), (3, 5)]


def places(window: tuple[int, int]) -> list[tuple[int, int]]:
    return [(y, x) for y in range(window[0]) for x in range(window[1])]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_relative_bias_reads_the_row_of_each_offset(window: tuple[int, int]) -> None:
    relative = RelativeBias(window, 3)
    bias, width = relative.bias(), 2 * window[1] - 1
    for i, (yi, xi) in enumerate(places(window)):
        for j, (yj, xj) in enumerate(places(window)):
            row = (yi - yj + window[0] - 1) * width + (xi - xj + window[1] - 1)
            assert torch.equal(bias[:, i, j], relative.table[row])


@pytest.mark.parametrize("prefix", [1, 3])
def test_prefix_tokens_share_the_last_three_rows(prefix: int) -> None:
    relative = RelativeBias((2, 3), 4, prefix=prefix)
    bias, p = relative.bias(), prefix
    out, back, among = relative.table[-3:]
    assert bias.shape == (4, 6 + p, 6 + p)
    torch.testing.assert_close(bias[:, p:, p:], by_rows(relative))
    torch.testing.assert_close(bias[:, :p, p:], out.view(-1, 1, 1).expand(4, p, 6))
    torch.testing.assert_close(bias[:, p:, :p], back.view(-1, 1, 1).expand(4, 6, p))
    torch.testing.assert_close(bias[:, :p, :p], among.view(-1, 1, 1).expand(4, p, p))


def by_rows(relative: RelativeBias) -> torch.Tensor:
    """The slow twin: an index of rows, and a gather."""
    height, width = relative.window
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    rows = (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1
    return relative.table[rows].permute(2, 0, 1)


@pytest.mark.parametrize("name", MAKER["BIASES"])
def test_timm_reads_the_same_table_the_same_way(name: str) -> None:
    window, prefix = MAKER["BIASES"][name]
    relative = RelativeBias(window, 4, prefix=prefix)
    table = MAKER["table"]((1, len(relative.table)), 0)[0]
    relative.load_state_dict({"table": table})
    theirs = load_file(GOLDENS / "position_table.safetensors")[name]
    torch.testing.assert_close(relative.bias().detach(), theirs, atol=0, rtol=0)


def test_attention_accepts_the_bias_as_its_mask() -> None:
    relative, qkv = RelativeBias((2, 3), 4), torch.randn(3, 2, 4, 6, 8)
    ours = F.scaled_dot_product_attention(*qkv, attn_mask=relative.bias())
    q, k, v = qkv
    slow = relative(q @ k.mT / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(ours, slow)


def test_a_smooth_table_survives_a_change_of_window() -> None:
    def smooth(window: tuple[int, int]) -> torch.Tensor:
        y = torch.linspace(-1, 1, 2 * window[0] - 1)[:, None]
        x = torch.linspace(-1, 1, 2 * window[1] - 1)
        return torch.stack([(y**2 + x).flatten(), (y * x).flatten()], dim=1)

    big, small = RelativeBias((7, 7), 2, prefix=1), RelativeBias((5, 6), 2, prefix=1)
    with torch.no_grad():
        big.table.copy_(torch.cat([smooth((7, 7)), torch.tensor([[7.0, 8], [9, 10], [11, 12]])]))
    small.load_state_dict(big.state_dict())
    torch.testing.assert_close(small.table[:-3], smooth((5, 6)), atol=0.2, rtol=0)
    assert torch.equal(small.table[-3:], big.table[-3:])


def test_resampling_a_table_is_bicubic_in_each_head() -> None:
    big, small = RelativeBias(7, 3), RelativeBias((3, 4), 3)
    small.load_state_dict(big.state_dict())
    image = big.table.detach().T.reshape(1, 3, 13, 13)
    slow = F.interpolate(image, size=(5, 7), mode="bicubic", antialias=True)
    torch.testing.assert_close(small.table.detach(), slow.flatten(2)[0].T)


def test_a_window_of_the_same_aspect_ratio_is_recognised_and_any_other_refused() -> None:
    wide, wider = RelativeBias((2, 3), 2), RelativeBias((4, 4), 2)
    assert wide.table.shape == (15, 2)
    with pytest.raises(ShapeError, match="cannot be told"):
        wider.load_state_dict(wide.state_dict())
    with pytest.raises(ShapeError, match="one of its dimensions"):
        RelativeBias((2, 3), 4).load_state_dict(wide.state_dict())


def test_logits_of_other_size_are_refused() -> None:
    for component in (RelativeBias(2, 3), AttentionBias(2, 3)):
        with pytest.raises(ShapeError, match="heads or tokens"):
            component(torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_attention_bias_reads_the_column_of_each_distance(window: tuple[int, int]) -> None:
    relative = AttentionBias(window, 3)
    with torch.no_grad():
        relative.table.normal_()
    bias = relative.bias()
    for i, (yi, xi) in enumerate(places(window)):
        for j, (yj, xj) in enumerate(places(window)):
            column = abs(yi - yj) * window[1] + abs(xi - xj)
            assert torch.equal(bias[:, i, j], relative.table[:, column])


def test_distances_are_resampled_for_each_head() -> None:
    big, small = AttentionBias(7, 3), AttentionBias((3, 5), 3)
    with torch.no_grad():
        big.table.normal_()
    small.load_state_dict(big.state_dict())
    image = big.table.detach().view(1, 3, 7, 7)
    slow = F.interpolate(image, size=(3, 5), mode="bicubic", antialias=True)
    torch.testing.assert_close(small.table.detach(), slow.view(3, 15))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_decomposed_bias_asks_the_query(window: tuple[int, int]) -> None:
    torch.manual_seed(0)
    relative, n = DecomposedRelativeBias(window, 4), window[0] * window[1]
    with torch.no_grad():
        relative.rows.normal_()
        relative.columns.normal_()
    logits, q = torch.randn(2, 3, n, n), torch.randn(2, 3, n, 4)
    y = relative(logits, q)
    for i, (yi, xi) in enumerate(places(window)):
        for j, (yj, xj) in enumerate(places(window)):
            row = relative.rows[yi - yj + window[0] - 1]
            column = relative.columns[xi - xj + window[1] - 1]
            wanted = logits[..., i, j] + q[..., i, :] @ row + q[..., i, :] @ column
            torch.testing.assert_close(y[..., i, j], wanted)


def test_decomposed_tables_are_resampled_linearly_as_in_mvit() -> None:
    big, small = DecomposedRelativeBias(7, 4), DecomposedRelativeBias((3, 5), 4)
    with torch.no_grad():
        big.rows.normal_()
        big.columns.normal_()
    small.load_state_dict(big.state_dict())
    for name, size in (("rows", 5), ("columns", 9)):
        slow = F.interpolate(getattr(big, name).detach().T[None], size=size, mode="linear")[0].T
        torch.testing.assert_close(getattr(small, name).detach(), slow)


def test_decomposed_bias_refuses_other_tokens() -> None:
    with pytest.raises(ShapeError, match="fill the window"):
        DecomposedRelativeBias(2, 4)(torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 5, 4))


def test_content_and_position_bias_shift_the_queries_of_each_head() -> None:
    both, q = ContentPositionBias(3, 4), torch.randn(2, 3, 5, 4)
    content, position = both(q)
    for head in range(3):
        torch.testing.assert_close(content[:, head], q[:, head] + both.content[head])
        torch.testing.assert_close(position[:, head], q[:, head] + both.position[head])
