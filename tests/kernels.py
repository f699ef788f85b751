"""A fixture: the native kernel, installed, or built now where a C compiler is there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from learnables import _native
from learnables._native import statistics

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory):
    """``learnables._native.statistics`` with a library to call."""
    if not statistics.available()[0]:
        if shutil.which(os.environ.get("CC", "cc")) is None:
            pytest.skip("statistics.c is not built and there is no C compiler")
        folder = tmp_path_factory.mktemp("kernel")
        build = "import setuptools; setuptools.setup()"
        where = ["--build-lib", str(folder), "--build-temp", str(folder / "temp")]
        command = [sys.executable, "-c", build, "-q", "build_ext", *where]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        os.environ[_native.FOLDER] = str(folder / "learnables" / "_native")
        _native.load.cache_clear()
        statistics.available.cache_clear()
    there, why = statistics.available()
    assert there, why
    return statistics
