from pathlib import Path

import pytest
from tests.init.page import COLUMNS, PAGES, written_in


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_numbers_of_the_page_are_those_of_the_benchmark(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert all(f"<!-- {name}: begin -->" in text for name in COLUMNS)
    assert written_in(page) == text, "run: python -m tests.init.page"
