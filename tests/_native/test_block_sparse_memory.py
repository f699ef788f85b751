"""The native kernel with every access to memory checked, by a compiler that can do that."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from learnables import _native
from learnables.sparse import kernels

ROOT = Path(__file__).parents[2]
FLAGS = "-shared -fPIC -O1 -g -pthread -fsanitize=address,undefined -fno-sanitize-recover=all"


def sanitizer() -> str:
    """The library that must be loaded before all others; empty where there is none."""
    if not sys.platform.startswith("linux") or shutil.which("gcc") is None:
        return ""
    ask = ["gcc", "-print-file-name=libasan.so"]
    found = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    return found if Path(found).is_absolute() else ""


@pytest.mark.slow
@pytest.mark.skipif(not sanitizer(), reason="no gcc with AddressSanitizer")
def test_no_shape_and_no_damaged_index_leads_out_of_bounds(tmp_path) -> None:
    source = Path(_native.__file__).parent / "block_sparse.c"
    built = tmp_path / "_block_sparse.so"
    subprocess.run(["gcc", *FLAGS.split(), str(source), "-o", str(built)], check=True)
    env = {
        **{name: value for name, value in os.environ.items() if name != kernels.FORCE},
        _native.FOLDER: str(tmp_path),
        "LD_PRELOAD": sanitizer(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONMALLOC": "malloc",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests._native.block_sparse_cases", "200"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip().endswith("cases: 200")
