import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learnables.dynamic import FORMS, estimate, quickest
from learnables.dynamic.cost import (
    by_samples,
    chunk_of,
    quickest_convolution,
    samples_of,
    tile_of,
)

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "dynamic.json"

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
    some = samples_of(B, I, O)
    assert 1 <= chunk <= I
    assert 1 <= some <= B
    assert some * I * O <= max(1 << 18, I * O * -(-B // 64))
    assert tile >= 1
    assert chunk * B * O <= max(1 << 18, B * O * -(-I // 64))
    assert tile * T * I * K <= max(1 << 20, 2 * 64 * I * K, T * I * K)


def test_one_row_of_many_samples_is_reassociated_and_many_rows_are_not() -> None:
    assert quickest(FORMS, 256, 1, 256, 256, 8) == "reassociated"
    assert quickest(FORMS, 16, 64, 256, 256, 8) != "reassociated"


def test_one_small_weight_is_written_out_and_many_large_ones_are_not() -> None:
    assert quickest(FORMS, 1, 16, 64, 64, 16) == "materialised"
    assert quickest(FORMS, 1024, 64, 256, 256, 8) == "chunked"


@pytest.mark.parametrize(("part", "least"), [("forms", 0.9), ("unseen", 0.85)])
def test_what_is_chosen_is_close_to_what_was_quickest_when_measured(part, least) -> None:
    """Against recorded times of all forms: those it was fitted to, and shapes it never saw."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["parts"][part]["rows"]
    assert len(rows) >= 24
    ratios = []
    for row in rows:
        times = {form: row[f"{form}_ms"] for form in FORMS}
        chosen = quickest(FORMS, *(row[size] for size in "BTIOK"))
        ratios.append(times[chosen] / min(times.values()))
    assert sum(ratio <= 1.1 for ratio in ratios) >= least * len(rows), sorted(ratios)
    assert max(ratios) < 2


def test_long_inputs_are_chunked_by_samples_and_wide_banks_by_rows() -> None:
    assert by_samples(256, 64, 256, 256, 8)
    assert not by_samples(256, 1, 256, 256, 256)


def test_few_places_are_convolved_first_and_many_are_not() -> None:
    assert quickest_convolution(64, 4, 64, 9, 64, 8) == "reassociated"
    assert quickest_convolution(16, 256, 64, 9, 64, 8) == "materialised"
