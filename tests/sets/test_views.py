"""A view is reversible, agrees with plain torch, and says what does not fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learnables.errors import ConstraintError, ShapeError
from learnables.sets.views import View

VIEWS = [
    ("rows", (4, 3, 2), lambda x: x.reshape(4, 6)),
    ("rows", (4, 3), lambda x: x),
    ("rows", (4,), lambda x: x),
    ("cols", (4, 3), lambda x: x.T),
    ("cols", (4, 3, 2), lambda x: x.reshape(4, 6).T),
    ("conv", (4, 3, 2, 2), lambda x: x.reshape(4, 12)),
    ("heads:2", (6, 5), lambda x: torch.stack([x[:3], x[3:]])),
    ("qkv:3", (6, 5), lambda x: torch.stack([x[:2], x[2:4], x[4:]])),
    ("(h d) i -> h d i, h=2", (6, 5), lambda x: torch.stack([x[:3], x[3:]])),
    ("(d h) i -> h i d, h=2", (6, 5), lambda x: torch.stack([x[0::2].T, x[1::2].T])),
    ("o i -> (i o)", (2, 3), lambda x: x.T.reshape(6)),
    ("o i h w -> (h w) o i", (2, 3, 2, 2), lambda x: x.permute(2, 3, 0, 1).reshape(4, 2, 3)),
]


@pytest.mark.parametrize(("text", "shape", "wanted"), VIEWS, ids=[v[0] for v in VIEWS])
def test_points_are_what_torch_makes_and_come_back(text, shape, wanted) -> None:
    x, view = torch.randn(shape), View(text)
    view.check(x.shape)
    points = view.points(x)
    assert torch.equal(points, wanted(x))
    assert torch.equal(view.back(points, x.shape), x)
    strided = x.mT.contiguous().mT if x.ndim > 1 else x
    assert torch.equal(view.back(view.points(strided), x.shape), x)


@given(sizes=st.lists(st.integers(1, 4), min_size=4, max_size=4), order=st.permutations("abcd"))
def test_any_pattern_can_be_undone(sizes, order) -> None:
    given_sizes = ", ".join(f"{axis}={n}" for axis, n in zip("ac", sizes[::2], strict=True))
    view = View(f"(a b) (c d) -> ({order[0]} {order[1]}) {order[2]} {order[3]}, {given_sizes}")
    x = torch.randn(sizes[0] * sizes[1], sizes[2] * sizes[3])
    view.check(x.shape)
    assert torch.equal(view.back(view.points(x), x.shape), x)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("conv", (4, 3), "at least 3 dimensions"),
        ("cols", (4,), "at least 2 dimensions"),
        ("heads:12", (100, 3), r"12 divides, e.g. \(96, 3\)"),
        ("heads:0", (4, 3), "0 divides"),
        ("(h d) i -> h d i, h=5", (6, 5), "5 does not fit 6"),
        ("o i -> i o", (6, 5, 2), "2 dimensions"),
    ],
)
def test_a_view_that_does_not_fit_says_so(text, shape, message) -> None:
    with pytest.raises(ShapeError, match=message):
        View(text).check(torch.Size(shape))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("columns", "does not exist"),
        ("heads:x", "does not exist"),
        ("a b -> a", "on one side only"),
        ("a a -> a", "twice"),
        ("(a b c) -> a b c, a=2", "more than one axis of unknown size"),
        ("a b -> b a, z=3", "are no axes"),
        ("a b -> b a, a=x", "no axes"),
    ],
)
def test_a_text_without_meaning_is_refused(text, message) -> None:
    with pytest.raises(ConstraintError, match=message):
        View(text)
