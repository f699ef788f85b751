import math

import pytest
import torch
from torch import nn

import learnables as ln
from learnables.errors import CheckpointError, LearnablesError, LearnablesWarning
from learnables.runtime.checkpoint import read_checkpoint


def model_of(step: int) -> nn.Module:
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, step)
    return model


def save_all(kept, scores):
    for step, score in enumerate(scores, start=1):
        kept.save(model_of(step), step=step, score=score, random_state=False)


@pytest.mark.parametrize(
    ("best", "scores", "steps"),
    [
        (None, [None] * 5, [4, 5]),
        ("max", [0.1, 0.9, 0.3, 0.4, 0.5], [2, 4, 5]),
        ("min", [0.1, 0.9, 0.3, 0.4, 0.5], [1, 4, 5]),
        ("max", [0.9, 0.9, 0.1, 0.1, 0.1], [2, 4, 5]),
        ("max", [math.nan, 0.2, math.nan, math.nan, -math.inf], [2, 4, 5]),
        ("min", [-math.inf, 0.2, 0.1, 0.1, 0.1], [1, 4, 5]),
        ("max", [None] * 5, [4, 5]),
        ("max", [1, 2, 3, 4, 5], [4, 5]),
    ],
)
def test_the_last_two_and_the_best_are_kept(tmp_path, best, scores, steps):
    kept = ln.Checkpoints(tmp_path / "new", keep=2, best=best)
    save_all(kept, scores)
    assert kept.steps == steps
    assert sorted(p.name for p in kept.folder.iterdir()) == [
        f"step-{step:09d}.safetensors" for step in steps
    ]


def test_the_wanted_one_is_loaded(tmp_path):
    kept = ln.Checkpoints(tmp_path, keep=1, best="min")
    save_all(kept, [3.0, 1.0, 2.0])
    model = model_of(0)
    assert kept.load(model).step == 3
    assert model.weight[0, 0] == 3
    loaded = kept.load(model, which="best")
    assert (loaded.step, loaded.extra["score"], model.weight[0, 0].item()) == (2, 1.0, 2.0)


def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path):
    kept = ln.Checkpoints(tmp_path, keep=3, best="max")
    save_all(kept, [1.0, 2.0, 3.0])
    raw = kept.latest.read_bytes()
    kept.latest.write_bytes(raw[: len(raw) // 2])
    model = model_of(0)
    with pytest.warns(LearnablesWarning, match="an older one is taken"):
        assert kept.load(model).step == 2
    assert model.weight[0, 0] == 2


def test_with_none_that_is_whole_the_error_says_so(tmp_path):
    kept = ln.Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        kept.load(model_of(0))
    save_all(kept, [1.0])
    kept.latest.write_bytes(b"x")
    with (
        pytest.warns(LearnablesWarning),
        pytest.raises(CheckpointError, match="1 files, none of them whole"),
    ):
        kept.load(model_of(0))


def test_nothing_old_goes_before_the_new_one_is_there(tmp_path, monkeypatch):
    kept = ln.Checkpoints(tmp_path, keep=1)
    save_all(kept, [None])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("learnables.runtime.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        kept.save(model_of(2), step=2)
    assert kept.steps == [1]
    assert read_checkpoint(kept.latest).step == 1


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-best.safetensors").write_bytes(b"mine")
    save_all(ln.Checkpoints(tmp_path, keep=1), [None] * 3)
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "step-best.safetensors").exists()


def test_training_goes_on_from_it_bit_equal(tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()

    kept = ln.Checkpoints(tmp_path, keep=2)
    model, optimizer = build()
    for number in range(1, 6):
        step(model, optimizer)
        kept.save(model, optimizer, step=number)
    step(model, optimizer)
    again, optimizer = build()
    assert kept.load(again, optimizer).step == 5
    step(again, optimizer)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(LearnablesError, match="at least the newest"):
        ln.Checkpoints(tmp_path, keep=0)


def test_a_best_that_is_neither_least_nor_greatest_is_refused_before_anything_is_saved(tmp_path):
    with pytest.raises(LearnablesError, match="found: best='lowest'"):
        ln.Checkpoints(tmp_path, best="lowest")
