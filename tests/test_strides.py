"""Strides as torch itself would choose them; oddities as counting all elements finds them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learnables.strides import (
    fits,
    format_of,
    has_other_order,
    is_dense,
    laid_out,
    like,
    overlaps_itself,
    share_an_element,
    wanted_strides,
)

sizes = st.integers(0, 4)
FORMATS = [torch.contiguous_format, torch.channels_last, torch.channels_last_3d]


@st.composite
def views(draw):
    """Any view that slicing, permuting, expanding and as_strided make of a small tensor."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    strides = [draw(st.integers(0, 7)) for _ in shape]
    return torch.zeros(100).as_strided(shape, strides, draw(st.integers(0, 5)))


def places(x):
    """Every element's place in the storage, one after the other: the slow way."""
    found = [x.storage_offset()]
    for size, stride in zip(x.shape, x.stride(), strict=True):
        found = [at + i * stride for at in found for i in range(size)]
    return found


@given(shape=st.lists(sizes, max_size=6), memory_format=st.sampled_from(FORMATS))
def test_strides_are_those_of_a_new_tensor(shape, memory_format) -> None:
    if not fits(len(shape), memory_format):
        with pytest.raises(RuntimeError):
            torch.empty(shape, memory_format=memory_format)
        return
    made = torch.empty(shape, memory_format=memory_format)
    assert wanted_strides(shape, memory_format) == made.stride()


@given(x=views())
def test_overlap_gaps_and_density_are_what_counting_finds(x) -> None:
    at = places(x)
    assert overlaps_itself(x) == (len(set(at)) < len(at))
    one_block = len(set(at)) == len(at) == max(at) - min(at) + 1
    assert is_dense(x) == one_block


@given(x=views(), y=views())
def test_two_views_share_an_element_where_counting_finds_one(x, y) -> None:
    assert share_an_element(x, y) == bool(set(places(x)) & set(places(y)))


def test_views_of_two_dtypes_share_where_their_ranges_meet() -> None:
    memory = torch.zeros(8)
    halves = memory.view(torch.int16)
    assert share_an_element(memory[2:4], halves[4:5])
    assert not share_an_element(memory[2:4], halves[8:])


@given(x=views())
def test_what_is_laid_out_is_equal_and_as_wanted(x) -> None:
    x = torch.arange(100.0).as_strided(x.shape, x.stride(), x.storage_offset())
    made = laid_out(x)
    assert made.stride() == wanted_strides(x.shape)
    torch.testing.assert_close(made, x, rtol=0, atol=0)
    assert (made is x) == (x.stride() == wanted_strides(x.shape))
    again = like(made, torch.empty_strided(x.shape, wanted_strides(x.shape)))
    assert again is made


def test_order_is_that_of_dimensions_with_more_than_one_element() -> None:
    x = torch.zeros(2, 3, 1, 1)
    assert not has_other_order(x, x.to(memory_format=torch.channels_last))
    assert has_other_order(torch.zeros(2, 3), torch.zeros(3, 2).t())


def test_layouts_have_names() -> None:
    image = torch.zeros(2, 3, 4, 5)
    assert format_of(image) is torch.contiguous_format
    assert format_of(image.to(memory_format=torch.channels_last)) is torch.channels_last
    assert format_of(image.permute(3, 2, 1, 0)) is None
    assert format_of(torch.zeros(3, 2).t()) is None
    assert format_of(torch.zeros(8).as_strided((1, 1, 8), (1, 1, 1))) is torch.contiguous_format
