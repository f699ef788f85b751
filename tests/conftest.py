"""One thread per test process, Hypothesis without a deadline."""

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
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
