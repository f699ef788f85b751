"""One process, DDP and FSDP2 say the same; the table that `learnables bench ranks` prints."""

import dataclasses

import pytest

from learnables.testing.ranks import (
    ROWS,
    TOLERANCE,
    Cell,
    EqualityTable,
    compare_answers,
    compare_ranks_with_one,
)


def test_two_ranks_say_what_one_process_says():
    table = compare_ranks_with_one((2,))
    assert list(table.cells) == ["ddp × 2", "fsdp2 × 2"]
    assert all(set(column) == set(ROWS) for column in table.cells.values())
    assert table.all_equal, str(table)
    assert table.cells["ddp × 2"]["statistics"].difference == 0


@pytest.mark.slow  # thirteen processes
def test_four_ranks_say_it_too():
    table = compare_ranks_with_one((4,))
    assert table.all_equal, str(table)


@pytest.mark.parametrize(
    "other",
    [
        {"exact": [1], "values": {"a": [1.0, 2.0]}},
        {"exact": [0], "values": {"a": [1.0, 2.0 + 1e-6]}},
        {"exact": [0], "values": {"a": [1.0, None]}},
        {"exact": [0], "values": {"a": [1.0]}},
        {"exact": [0], "values": {"a": [1.0, float("nan")]}},
        {"exact": [0], "values": {}},
    ],
    ids=["finding", "number", "absent", "shorter", "nan", "lost"],
)
def test_answer_that_differs_is_told_from_one_that_does_not(other):
    one = {"exact": [0], "values": {"a": [1.0, 2.0]}}
    assert compare_answers(one, one) == Cell(True, 0.0, "")
    cell = compare_answers(one, other)
    assert not cell.equal
    assert cell.why


def test_table_prints_what_differs():
    good = dict.fromkeys(ROWS, Cell(True, 0.0))
    table = EqualityTable({"ddp × 2": good, "fsdp2 × 2": dict(good)}, "cpu")
    assert table.all_equal
    table.cells["fsdp2 × 2"]["audit"] = dataclasses.replace(good["audit"], equal=False, why="LRN1")
    assert not table.all_equal
    assert "DIFFERS" in str(table)
    assert "fsdp2 × 2, audit: LRN1" in str(table)
    assert f"{TOLERANCE:g}" in str(table)
