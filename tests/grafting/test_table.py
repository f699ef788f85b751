"""The table of the page is what was measured, and covers what the tests hold."""

import json

import pytest
from tests.integrations.grafts import (
    BEGIN,
    COMPONENTS,
    END,
    FAMILIES,
    RESULTS,
    ROOT,
    expected,
    table,
)


@pytest.fixture(scope="module")
def results():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_shows_what_was_measured(language, results):
    page = (ROOT / "docs" / language / "grafting.md").read_text(encoding="utf-8")
    shown = page.split(BEGIN)[1].split(END)[0].strip()
    assert shown == table(results, language), "run: python -m tests.integrations.grafts"


def test_every_combination_was_measured_and_is_as_the_tests_expect(results):
    measured = results["combinations"]
    assert list(measured) == list(FAMILIES)
    for family, cells in measured.items():
        assert list(cells) == list(COMPONENTS)
        for component, cell in cells.items():
            assert cell["outcome"] == expected(family, component), (family, component)


def test_no_graft_added_a_graph_break(results):
    cells = [cell for row in results["combinations"].values() for cell in row.values()]
    assert sum(cell["outcome"] == "works" for cell in cells) >= 60
    assert {cell["breaks"] for cell in cells if cell["outcome"] == "works"} == {0}
