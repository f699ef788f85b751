import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learnables.errors import LayoutError, ShapeError
from learnables.sparse.layout import Layout, layout_from_index


@st.composite
def layouts(draw):
    out_features, in_features = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    p, q = draw(st.integers(1, out_features)), draw(st.integers(1, in_features))
    rows, columns = -(-out_features // p), -(-in_features // q)
    cells = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return Layout(out_features, in_features, (p, q), torch.tensor(cells).view(rows, columns))


@given(layout=layouts())
def test_index_by_rows_and_by_columns_name_the_same_blocks(layout) -> None:
    index = layout.index
    by_rows = [
        (row, int(index.columns[i]), int(i))
        for row in range(layout.grid[0])
        for i in range(index.row_starts[row], index.row_starts[row + 1])
    ]
    by_columns = [
        (int(index.rows[j]), column, int(index.order[j]))
        for column in range(layout.grid[1])
        for j in range(index.column_starts[column], index.column_starts[column + 1])
    ]
    assert by_rows == sorted(by_columns)
    assert [[row, column] for row, column, _ in by_rows] == layout.mask.nonzero().tolist()
    assert [i for _, _, i in by_rows] == list(range(layout.num_blocks))


@given(layout=layouts())
def test_density_and_fan_in_count_real_entries(layout) -> None:
    (p, q), (R, _) = layout.block, layout.grid
    whole = layout.mask.repeat_interleave(p, 0).repeat_interleave(q, 1)
    real = whole[: layout.out_features, : layout.in_features]
    assert layout.density == pytest.approx(real.float().mean().item())
    assert list(layout.fan_in) == [int(real[row * p].sum()) for row in range(R)]
    assert layout.weight_shape == (layout.num_blocks, p, q)
    inside = torch.ones(layout.weight_shape) if layout.edge_mask is None else layout.edge_mask
    assert int(inside.sum()) == int(real.sum())


@given(layout=layouts())
def test_index_leads_back_to_the_layout(layout) -> None:
    index = layout.index
    back = layout_from_index(
        layout.out_features, layout.in_features, layout.block, index.row_starts, index.columns
    )
    assert back == layout
    assert hash(back) == hash(layout)
    assert pickle.loads(pickle.dumps(layout)) == layout == copy.deepcopy(layout)


@pytest.mark.parametrize(
    ("row_starts", "columns"),
    [
        ([0, 1, 2], [0, 3]),
        ([0, 1, 2], [0, -1]),
        ([0, 2, 2], [0, 0]),
        ([0, 2, 2], [1, 0]),
        ([0, 1, 3], [0, 1]),
        ([1, 1, 2], [0, 1]),
        ([0, 2, 1], [0]),
        ([0, 2], [0, 1]),
        ([0.0, 1.0, 2.0], [0, 1]),
        ([0, 1, 2], [[0, 1]]),
    ],
)
def test_damaged_index_is_refused(row_starts, columns) -> None:
    with pytest.raises(LayoutError, match="do not describe the blocks"):
        layout_from_index(4, 6, 2, torch.tensor(row_starts), torch.tensor(columns))


@pytest.mark.parametrize(
    ("size", "mask", "error", "says"),
    [
        ((4, 6, 2), torch.ones(3, 2), ShapeError, r"mask of shape \(3, 2\).*wanted: \(2, 3\)"),
        ((4, 6, 2), torch.ones(4, 6), ShapeError, r"mask of shape \(4, 6\)"),
        ((4, 6, 2), torch.full((2, 3), float("nan")), LayoutError, "found: 6 NaN"),
        ((4, 6, 5), torch.ones(1, 2), LayoutError, r"larger than the matrix.*block=\(4, 5\)"),
        ((4, 6, 0), torch.ones(1, 1), LayoutError, "positive"),
        ((0, 6, 2), torch.ones(1, 3), LayoutError, "positive"),
    ],
)
def test_what_is_no_layout_is_refused(size, mask, error, says) -> None:
    with pytest.raises(error, match=f"(?s){says}"):
        Layout(*size, mask)


def test_later_writes_to_the_given_mask_change_nothing() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    layout = Layout(4, 6, 2, mask)
    mask.zero_()
    assert layout.num_blocks == 6


def test_index_is_real_also_where_a_model_is_built_on_meta() -> None:
    with torch.device("meta"):
        layout = Layout(4, 6, 2, [[1, 0, 1], [0, 1, 0]])
        assert layout.index.columns.tolist() == [0, 2, 1]
        assert layout.edge_mask is None
        assert Layout(3, 6, 2, layout.mask).edge_mask.sum() == 2 * 4 + 2
