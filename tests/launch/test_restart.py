"""torchrun --max-restarts: who starts anew does not wait for the dead."""

import os
import subprocess
import sys
from pathlib import Path


def test_processes_that_are_started_anew_meet_one_another():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*launch, "--max-restarts=1", str(Path(__file__).with_name("restarted.py"))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks in attempt 1" in done.stdout
