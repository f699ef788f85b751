"""Run every Python block of the Markdown pages; give doctests the names that readers expect."""

import contextlib
import os
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from torch import nn

import learnables
from learnables._torch import end_process_group

torch.set_num_threads(1)
# Else the first torch.compile starts a pool of processes, which are seen as left behind.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
_NAMES = {"torch": torch, "nn": nn, "ln": learnables}


def _enter_page(namespace: dict[str, object]) -> None:
    """What a page writes goes into a folder of its own."""
    torch.manual_seed(0)
    namespace.update(_NAMES, _home=Path.cwd(), _folder=tempfile.TemporaryDirectory(), _ran=set())
    os.chdir(namespace["_folder"].name)


def _leave_page(namespace: dict[str, object]) -> None:
    os.chdir(namespace["_home"])
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["*.md"],
    excludes=["docs/en/rules/*"],  # their examples fail on purpose; tests/auditing runs them
    setup=_enter_page,
    teardown=_leave_page,
).pytest()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Blocks of a page build on those above them, which another process may have been given."""
    if not hasattr(item, "example"):
        return
    ran = item.example.namespace["_ran"]
    for above in item.session.items:
        if above is item:
            break
        if above.parent is item.parent and above.nodeid not in ran:
            ran.add(above.nodeid)
            with contextlib.suppress(unittest.SkipTest, pytest.skip.Exception):
                above.example.evaluate()
    ran.add(item.nodeid)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update-goldens`` writes tests/goldens again; the diff is read like code."""
    parser.addoption("--update-goldens", action="store_true", help="write tests/goldens again")


@pytest.fixture(autouse=True)
def _names_in_doctests(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(_NAMES)


@pytest.fixture(autouse=True)
def _no_process_group_is_left_behind() -> Iterator[None]:
    """Pages about DDP make a group of one process; the next test must be able to make its own.

    A group that was there before the test belongs to a fixture of wider scope, which ends it.
    """
    before = torch.distributed.is_initialized()
    yield
    if torch.distributed.is_initialized() and not before:
        end_process_group()
