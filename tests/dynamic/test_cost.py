from hypothesis import given
from hypothesis import strategies as st

from learnables.dynamic import FORMS, estimate, quickest
from learnables.dynamic.cost import chunk_of, tile_of

sizes = st.tuples(*[st.integers(1, 4096)] * 5)


@given(size=sizes)
def test_the_quickest_has_the_lowest_estimate(size) -> None:
    best = quickest(FORMS, *size)
    assert estimate(best, *size) == min(estimate(form, *size) for form in FORMS)
    assert quickest(("chunked",), *size) == "chunked"


@given(size=sizes)
def test_pieces_are_bounded(size) -> None:
    B, T, I, O, K = size  # noqa: E741
    chunk, tile = chunk_of(B, I, O), tile_of(T, I, K)
    assert 1 <= chunk <= I
    assert tile >= 1
    assert chunk * B * O <= max(1 << 18, B * O * -(-I // 64))
    assert tile * T * I * K <= max(1 << 20, 2 * 64 * I * K, T * I * K)


def test_one_row_of_many_samples_is_reassociated_and_many_rows_are_not() -> None:
    assert quickest(FORMS, 256, 1, 256, 256, 8) == "reassociated"
    assert quickest(FORMS, 16, 64, 256, 256, 8) != "reassociated"
