"""Tests with real timm, transformers, peft, accelerate and lightning: ``make test-integrations``.

Where these are not installed, nothing here is imported and everything is deselected by its marker.
"""

import os
import warnings
from pathlib import Path

import pytest
from tests.integrations.shim import ensure_torchvision

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched, and a miss is no retry
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
collect_ignore = ["programs", "site", "lightning_ddp.py"]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ensure_torchvision()  # before timm and transformers look for it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here; the warnings of other people's packages are theirs."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integration)
            item.add_marker(pytest.mark.filterwarnings("ignore"))
