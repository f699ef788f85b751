"""Every bug of the zoo is named, at its line where one line did it; no healthy program is accused.

All in one process, about 0.1 s a program; `benchmarks/zoo.py` gives each a process of its own.
"""

from pathlib import Path

import pytest
from tests.zoo.scoring import cases, load, outcome

pytestmark = pytest.mark.filterwarnings("ignore")

# Bugs that are not named, and why nothing can tell them from their twin.
OUT_OF_REACH = {
    "b017": "a table frozen by a default looks like one frozen on purpose; a note says it",
}
# Bugs that only somebody who knows the intent can name.
NEEDS_INTENT = {
    "b044": "the rates are equal already when the audit begins",
    "b088": "nothing says that the rows are meant to have norm 1 after the step",
    "b091": "nothing says that a ball is meant, and a sphere is a set as good",
    "b095": "the snapshot is neither in the model nor in the closure of the step",
    "b106": "the load lies behind, and the checkpoint is not at hand",
    "b109": "the old table is not at hand",
    "b110": "the load lies behind, and the checkpoint is not at hand",
    "b262": "nothing says that the zeros are a mask",
    "b263": "nothing says that the rows are meant to stay",
    "b264": "nothing says that the weight is meant to stay non-negative",
}
# Bugs with two victims, each with a finding of its own.
TWO_SIDED = {"b215": "one network is stepped twice, the other never"}


def number(path: Path) -> str:
    return path.stem[:4]


def show(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", cases("b"), ids=show)
def test_the_witness_tells_the_bug_from_its_twin(path: Path) -> None:
    case = load(path)
    assert case.witness(case.build)[0]
    case = load(path)
    assert not case.witness(case.build_fixed)[0]


def bugs(*without: str) -> list[Path]:
    return [path for path in cases("b") if number(path) not in without]


@pytest.mark.parametrize("path", bugs(*OUT_OF_REACH), ids=show)
def test_one_finding_names_the_culprit_and_the_guilty_line(path: Path) -> None:
    found = outcome(path, "build")
    assert found.hits, found.report
    assert len(found.loud) == 1 or number(path) in TWO_SIDED, found.report
    guilty = getattr(load(path), "GUILTY", "")
    assert any(guilty in finding.quote for finding in found.hits), found.report


@pytest.mark.parametrize("path", bugs(*OUT_OF_REACH, *NEEDS_INTENT), ids=show)
def test_told_nothing_it_is_found_all_the_same(path: Path) -> None:
    found = outcome(path, "build", blind=True)
    assert found.hits, found.report


@pytest.mark.parametrize("number_", sorted({*OUT_OF_REACH, *NEEDS_INTENT}))
def test_what_is_said_to_be_out_of_reach_is(number_: str) -> None:
    (path,) = [p for p in cases("b") if number(p) == number_]
    assert not outcome(path, "build", blind=number_ in NEEDS_INTENT).hits


@pytest.mark.parametrize("path", cases("b"), ids=show)
def test_the_twin_is_not_accused(path: Path) -> None:
    for blind in (False, True):
        twin = outcome(path, "build_fixed", blind=blind)
        assert twin.loud == (), twin.report


@pytest.mark.parametrize("path", cases("n"), ids=show)
def test_a_healthy_program_is_not_accused(path: Path) -> None:
    for blind in (False, True):
        healthy = outcome(path, "build", blind=blind)
        assert healthy.loud == (), healthy.report
