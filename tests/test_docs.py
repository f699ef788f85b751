"""What the pages point at exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part == "runs" for part in page.relative_to(ROOT).parts)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_and_every_named_example_exists(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [link for link in links if link and "://" not in link]
    missing = [link for link in local if not (page.parent / link).exists()]
    named = re.findall(r"`((?:examples/)?[a-z0-9_]+\.py)`", text)
    missing += [
        name for name in named if name.startswith("examples/") and not (ROOT / name).exists()
    ]
    assert not missing
