from tests.init.page import COLUMNS, PAGE, rendered


def test_the_numbers_of_the_page_are_those_of_the_benchmark() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- {name}: begin -->" in page for name in COLUMNS)
    assert rendered(page) == page, "run: python -m tests.init.page"
