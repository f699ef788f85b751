"""Run every Python block of the Markdown pages; give doctests the names that readers expect."""

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from torch import nn

import learnables

torch.set_num_threads(1)
_NAMES = {"torch": torch, "nn": nn, "ln": learnables}

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["*.md"],
    excludes=["docs/en/rules/*"],  # their examples fail on purpose; tests/auditing runs them
    setup=lambda namespace: (torch.manual_seed(0), namespace.update(_NAMES)),
).pytest()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update-goldens`` writes tests/goldens again; the diff is read like code."""
    parser.addoption("--update-goldens", action="store_true", help="write tests/goldens again")


@pytest.fixture(autouse=True)
def _names_in_doctests(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(_NAMES)
