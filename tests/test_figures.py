"""What the pages print is what the result files say, and one part of a file leaves the others."""

import importlib
import json
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parents[1]
TABLES = [
    ("sparse", "sparse"),
    ("dynamic", "dynamic"),
    ("rigl", "sparse"),
    ("graft", "grafting"),
    ("prompts", "grafting"),
]  # script, page


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script of benchmarks/ as if it were run there."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


@pytest.mark.parametrize(("script", "page"), TABLES)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_page_prints_what_its_file_says(script, page, language, benchmark) -> None:
    text = (ROOT / "docs" / language / f"{page}.md").read_text(encoding="utf-8")
    between = text.split(f"<!-- benchmarks/{script}.py --table -->")[1]
    printed = between.split(f"<!-- end of {script} -->")[0]
    table = benchmark(script).table(language)
    assert table.count("|") > 20
    assert [line.strip() for line in printed.split("\n") if line.strip()] == [
        line.strip() for line in table.split("\n") if line.strip()
    ]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_curve_of_prompts_is_drawn_from_its_file(language, benchmark) -> None:
    script = benchmark("prompts")
    drawn = script.picture(language).read_text(encoding="utf-8")
    assert drawn == script.drawing(language)
    page = (ROOT / "docs" / language / "grafting.md").read_text(encoding="utf-8")
    assert f"]({script.picture(language).name})" in page
    ET.fromstring(drawn)


def test_a_part_that_is_measured_anew_leaves_the_others(benchmark, monkeypatch, tmp_path) -> None:
    environment = benchmark("environment")
    monkeypatch.setattr(environment, "RESULTS", tmp_path)
    assert environment.parts("figures") == {}
    environment.save_part("figures", "one", [{"ms": 1.0}], backend="torch")
    environment.save_part("figures", "two", [{"ms": 2.0}])
    environment.save_part("figures", "one", [{"ms": 3.0}])
    found = environment.parts("figures")
    assert [found[name]["rows"] for name in ("one", "two")] == [[{"ms": 3.0}], [{"ms": 2.0}]]
    assert all("torch" in part["environment"] for part in found.values())
    assert "backend" not in found["one"]
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["parts"] == found
