import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learnables.errors import LayoutError
from learnables.sparse import SET, Layout, Prune, RigL, random
from learnables.sparse.topology import Standing, block_rms, gradient_rms, source_of


def a_standing(rows, columns, density, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = random(rows, columns, density, generator=generator)
    size = torch.where(mask, torch.rand(rows, columns, generator=generator) + 0.1, 0.0)
    return Standing(mask, size, int(mask.sum()), torch.rand(rows, columns, generator=generator))


sides = st.integers(1, 6)
one = st.builds(a_standing, sides, sides, st.floats(0.05, 1), st.integers(0, 99))
standings = st.lists(one, min_size=1, max_size=3)
some_rule = st.sampled_from([SET(0.5), RigL(0.5), RigL(1.0), SET(0.0)])


@given(standings=standings, rule=some_rule, progress=st.floats(0, 1.5))
def test_exchange_keeps_their_number_and_empties_no_layer(standings, rule, progress) -> None:
    masks = rule.next_masks(standings, progress, torch.Generator().manual_seed(0))
    assert sum(int(m.sum()) for m in masks) == sum(int(s.mask.sum()) for s in standings)
    for mask, s in zip(masks, standings, strict=True):
        assert mask.any()
        assert mask.view(-1)[s.size.argmax()]  # the largest block of a layer is never dropped
        if progress >= 1 or rule.fraction == 0:
            assert torch.equal(mask, s.mask)


@given(seed=st.integers(0, 999), fraction=st.floats(0, 1))
def test_what_is_dropped_is_smaller_than_what_stays(seed, fraction) -> None:
    standing = a_standing(5, 6, 0.4, seed)
    least = standing.gradient.where(~standing.mask, 0.0)  # nothing stored is asked for again
    (mask,) = RigL(fraction).next_masks(
        [Standing(standing.mask, standing.size, 12, least)], 0.0, torch.Generator()
    )
    dropped, stays = standing.mask & ~mask, standing.mask & mask
    if dropped.any():
        assert standing.size[dropped].max() <= standing.size[stays].min()
        grown, still_out = mask & ~standing.mask, ~mask & ~standing.mask
        assert not still_out.any() or least[grown].min() >= least[still_out].max()


def test_rigl_grows_where_the_gradient_is_largest() -> None:
    mask = torch.eye(4).bool()
    size = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    gradient = torch.zeros(4, 4)
    gradient[0, 2], gradient[3, 1], gradient[0, 0] = 5, 6, 9
    (after,) = RigL(0.5).next_masks([Standing(mask, size, 4, gradient)], 0.0, torch.Generator())
    wanted = mask.clone()
    wanted[2, 2] = wanted[3, 3] = False
    wanted[0, 2] = wanted[3, 1] = True
    assert torch.equal(after, wanted)


def test_set_grows_anywhere_equally_often() -> None:
    standing = a_standing(4, 4, 0.25, 0)
    generator = torch.Generator().manual_seed(0)
    grown = torch.stack([SET(0.5).next_masks([standing], 0.0, generator)[0] for _ in range(2000)])
    shares = grown.float().mean(0)
    free = shares[shares < 0.9]
    assert (free - 2 / 14).abs().max() < 0.04


def test_the_exchange_dies_out_as_a_half_cosine() -> None:
    standing = a_standing(16, 16, 0.5, 0)
    moved = []
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        (mask,) = RigL(0.5).next_masks([standing], progress, torch.Generator())
        kept = standing.size[standing.mask].sort(descending=True).values
        share = 0.25 * (1 + torch.tensor(progress * torch.pi).cos())
        dropped_at_most = int(share * 128)
        moved.append(int((standing.mask & ~mask).sum()))
        assert moved[-1] <= dropped_at_most
        assert kept.numel() == 128
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] == 0


@given(standings=standings, density=st.floats(0.05, 1.0))
def test_prune_ends_at_its_density_and_only_drops(standings, density) -> None:
    masks = Prune(density).next_masks(standings, 1.0, torch.Generator())
    cells, stored = sum(s.mask.numel() for s in standings), sum(s.initial for s in standings)
    assert sum(int(m.sum()) for m in masks) == min(stored, max(len(masks), round(density * cells)))
    for mask, s in zip(masks, standings, strict=True):
        assert not (mask & ~s.mask).any()
        assert mask.any()
    unchanged = Prune(density).next_masks(standings, 0.0, torch.Generator())
    assert all(torch.equal(mask, s.mask) for mask, s in zip(unchanged, standings, strict=True))


def test_prune_falls_as_the_cube_of_the_time_left() -> None:
    standing = a_standing(10, 10, 1.0, 0)
    left = [
        int(Prune(0.2).next_masks([standing], progress, torch.Generator())[0].sum())
        for progress in (0.0, 0.5, 1.0)
    ]
    assert left == [100, 20 + 80 // 8, 20]


def test_blocks_are_found_again() -> None:
    old = Layout(8, 8, 2, random(4, 4, 0.5))
    mask = old.mask.clone()
    mask[0] = ~mask[0]
    new = old.with_mask(mask)
    source = source_of(old, new).tolist()
    for (row, column), at in zip(mask.nonzero().tolist(), source, strict=True):
        assert at == (
            old.mask.nonzero().tolist().index([row, column]) if old.mask[row, column] else -1
        )


def test_norms_count_entries_inside_the_matrix_only() -> None:
    layout = Layout(5, 7, 4, torch.ones(2, 2))
    weight = 3.0 * layout.edge_mask
    torch.testing.assert_close(block_rms(weight, layout), torch.full((2, 2), 3.0).double())
    dense = torch.full((5, 7), 3.0)
    torch.testing.assert_close(gradient_rms(dense, layout), torch.full((2, 2), 3.0).double())


@pytest.mark.parametrize(
    "make", [lambda: SET(1.1), lambda: RigL(-0.1), lambda: Prune(0.0), lambda: Prune(2)]
)
def test_rules_out_of_range_are_refused(make) -> None:
    with pytest.raises(LayoutError, match="≤ 1"):
        make()
