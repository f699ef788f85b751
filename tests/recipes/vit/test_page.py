import dataclasses
import re
from pathlib import Path

from learnables.recipes.vit.config import Config

PAGE = (Path(__file__).parents[3] / "docs" / "en" / "vit.md").read_text(encoding="utf-8")


def test_page_lists_every_setting_with_its_default():
    rows = [line for line in PAGE.split("## Settings")[1].splitlines() if line.startswith("| `")]
    listed = {}
    for row in rows:
        names, defaults = (cell.strip() for cell in row.split("|")[1:3])
        values = [value.strip(" °") for value in defaults.split(",")]
        listed.update(zip(re.findall(r"`(\w+)`", names), values, strict=True))
    config = Config()
    assert set(listed) == {f.name for f in dataclasses.fields(Config)}
    for name, text in listed.items():
        value = getattr(config, name)
        said = {"none": None, "–": None, "true": True, "false": False}
        if text in said:
            assert value is said[text]
        elif isinstance(value, str):
            assert value == text
        else:
            assert float(text) == value
