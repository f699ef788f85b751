"""One thread per test process, Hypothesis without a deadline, real disks that fill up."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # behind nohup: no child would hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():  # read when Triton is imported: its kernels run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
hypothesis.settings.register_profile(
    "learnables", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("learnables")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with ``tests/goldens/NAME``; ``pytest --update-goldens`` writes it there."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / "goldens" / name
        if request.config.getoption("--update-goldens"):
            path.write_text(text, "utf-8")
        assert text == path.read_text("utf-8")

    return compare


@pytest.fixture
def disk_of(tmp_path):
    """A function from a size such as "300k" to a folder on a disk of its own of that size."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        may = shutil.which("mount") and hasattr(os, "geteuid") and os.geteuid() == 0
        if not may or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
