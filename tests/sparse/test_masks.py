import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learnables.errors import LayoutError
from learnables.sparse import banded, butterfly, largest, n_of_m, random

sizes = st.integers(1, 24)
densities = st.floats(0.01, 1.0)


@given(rows=sizes, columns=sizes, density=densities, seed=st.integers(0, 2**16))
def test_random_is_even_in_rows_and_in_columns(rows, columns, density, seed) -> None:
    mask = random(rows, columns, density, generator=torch.Generator().manual_seed(seed))
    for counts in (mask.sum(0), mask.sum(1)):
        assert counts.max() - counts.min() <= 1
    assert mask.sum() == max(1, round(density * rows * columns))


def test_random_is_random_and_repeatable() -> None:
    masks = [random(16, 16, 0.2, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_random_prefers_no_place() -> None:
    generator = torch.Generator().manual_seed(0)
    share = torch.stack([random(5, 7, 0.3, generator=generator) for _ in range(1000)])
    expected = round(0.3 * 35) / 35
    assert (share.float().mean(0) - expected).abs().max() < 5 * (expected / 1000) ** 0.5


@given(rows=sizes, columns=sizes, density=densities)
def test_banded_stores_nothing_farther_from_the_diagonal_than_it_leaves_out(
    rows, columns, density
) -> None:
    mask = banded(rows, columns, density)
    down, across = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    distance = (down[:, None] - across).abs()
    assert mask.sum() == max(1, round(density * rows * columns))
    if not mask.all():
        assert distance[mask].max() <= distance[~mask].min() + 1e-6


@given(size=st.integers(0, 5).map(lambda digits: 2**digits))
def test_butterfly_connects_everything_in_log_n_layers(size) -> None:
    mask = butterfly(size, size).long()
    assert (mask.sum(1) == 1 + size.bit_length() - 1).all()
    reached = torch.eye(size, dtype=torch.long)
    for _ in range(size.bit_length() - 1):
        reached = ((reached @ mask) > 0).long()
    assert reached.all()


@given(rows=sizes, columns=sizes)
def test_stretched_butterfly_leaves_nothing_unconnected(rows, columns) -> None:
    mask = butterfly(rows, columns)
    assert mask.any(0).all()
    assert mask.any(1).all()


@given(rows=sizes, columns=sizes, density=densities)
def test_butterfly_keeps_to_the_density_but_for_the_diagonal(rows, columns, density) -> None:
    diagonal = butterfly(rows, columns, 1e-9).sum()
    assert butterfly(rows, columns, density).sum() <= max(diagonal, density * rows * columns + 0.5)


@given(rows=sizes, columns=sizes, n=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_n_of_m_stores_n_of_each_group(rows, columns, n, seed) -> None:
    mask = n_of_m(rows, columns, n, 4, generator=torch.Generator().manual_seed(seed))
    for group in mask.split(4, 1):
        assert (group.sum(1) == min(n, group.shape[1])).all()


@given(rows=sizes, columns=sizes, density=densities, seed=st.integers(0, 2**16))
def test_largest_keeps_the_highest_scores(rows, columns, density, seed) -> None:
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = largest(scores, density)
    assert mask.sum() == max(1, round(density * rows * columns))
    if not mask.all():
        assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize(
    "family", [random, banded, butterfly, lambda R, C, d: largest(torch.rand(R, C), d)]
)
def test_density_outside_its_range_is_refused(family, density) -> None:
    with pytest.raises(LayoutError, match="0 < density ≤ 1"):
        family(4, 4, density)


def test_bad_groups_and_bad_scores_are_refused() -> None:
    with pytest.raises(LayoutError, match="5:4"):
        n_of_m(4, 8, 5, 4)
    with pytest.raises(LayoutError, match="1 NaN among 4"):
        largest(torch.tensor([[1.0, float("nan")], [0.0, 0.0]]), 0.5)


def test_masks_are_made_on_the_cpu_also_under_meta() -> None:
    with torch.device("meta"):
        for mask in (random(3, 5, 0.4), banded(3, 5, 0.4), butterfly(3, 5), n_of_m(3, 5)):
            assert mask.device.type == "cpu"
            assert mask.any()
