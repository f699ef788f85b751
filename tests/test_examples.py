import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = {"article_4_1_dynamic_weights": "20", "article_5_2_block_sparse": "20"}  # a short form


@pytest.mark.parametrize(
    "script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem
)
def test_runs_as_a_reader_would_run_it(script: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    steps = [STEPS[script.stem]] if script.stem in STEPS else []
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", str(script), *steps],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
