"""Inside each trainer the recorded gradient is the consumed one: the rows of the benchmark."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TRAINERS = (
    *("Lightning", "HF Trainer", "Accelerate"),
    *("Lightning, fp16", "HF Trainer, fp16", "Accelerate, fp16"),
    "optimizer in backward",
)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_recorded_is_consumed(
    trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import watch_trainers

    assert set(watch_trainers.ROWS) == set(TRAINERS)
    cells = watch_trainers.rows(trainer, str(tmp_path))
    assert len(cells) == (2 if trainer == "optimizer in backward" else 4)
    for cell in cells:
        assert cell["equal"], cell
        assert cell["skips marked"], cell
