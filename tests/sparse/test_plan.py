import gc

import pytest
import torch

from learnables.errors import LayoutError
from learnables.sparse import Layout, plan, random
from learnables.sparse.plan import plan_of


def test_plan_is_read_once_and_again_after_a_write() -> None:
    index = Layout(8, 8, 2, random(4, 4, 0.5)).index
    first = plan_of(index)
    assert plan_of(index) is first
    index.columns.copy_(index.columns.clone())
    assert plan_of(index) is not first
    assert plan_of(index) == plan_of(index)


def test_a_write_that_damages_the_index_is_refused_at_the_next_use() -> None:
    index = Layout(8, 8, 2, random(4, 4, 0.5)).index
    plan_of(index)
    index.columns[0] = 4
    with pytest.raises(LayoutError, match="columns from"):
        plan_of(index)


@pytest.mark.parametrize("name", ["column_starts", "rows", "order"])
@pytest.mark.parametrize("change", [10**6, -5, "swap"])
def test_tensors_by_columns_that_list_other_blocks_are_refused(name, change) -> None:
    """In range or not: a kernel on a GPU follows them without a look."""
    index = Layout(8, 8, 2, random(4, 4, 0.5, generator=torch.Generator().manual_seed(0))).index
    plan_of(index)
    part = getattr(index, name)
    if change == "swap":
        part.copy_(part.flip(0))
    else:
        part[1] += change
    with pytest.raises(LayoutError, match=f"other values in .*{name}"):
        plan_of(index)


def test_plans_of_gone_tensors_are_forgotten() -> None:
    index = Layout(8, 8, 2, random(4, 4, 0.5)).index
    name = id(index.columns)
    plan_of(index)
    assert name in plan._kept
    del index
    gc.collect()
    assert name not in plan._kept


def test_inference_tensors_have_plans_too() -> None:
    with torch.inference_mode():
        index = Layout(8, 8, 2, [[1, 0, 0, 1]] * 4).index
        assert index.columns.is_inference()
        assert plan_of(index).by_row[0] == ((0, 0), (1, 3))
