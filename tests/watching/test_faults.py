"""Whatever happens to the watcher, training goes on bit for bit as without it."""

import math
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import warnings

import pytest
import torch
from tests.watching.writer import told_by
from torch import nn

import learnables as ln
from learnables.errors import LearnablesError, LearnablesWarning, RunError
from learnables.watching import Run, recorder
from learnables.watching.compare import compare
from learnables.watching.sinks import Sink, TensorBoard

STEPS = 12


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, steps=STEPS, each=lambda step: None):
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()  # from the global generator
        optimizer.step()
        each(step)
    return [p.detach().clone() for p in model.parameters()]


def unwatched():
    return train(*make())


def assert_equal(found):
    torch.testing.assert_close(found, unwatched(), rtol=0, atol=0, equal_nan=True)


def test_watching_changes_nothing(tmp_path):
    model, optimizer = make()
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None):
        found = train(model, optimizer)
    assert_equal(found)


class Breaks(Sink):
    """A sink that fails at its n-th observation."""

    def __init__(self, at: int, error: Exception) -> None:
        self.left, self.error = at, error

    def observation(self, observation):
        self.left -= 1
        if self.left == 0:
            raise self.error

    def scalars(self, step, values):
        pass


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyError("x")], ids=["full disk", "bug"]
)
def test_a_sink_that_fails_ends_the_watch_with_one_warning(tmp_path, at, error):
    model, optimizer = make()
    with (
        pytest.warns(LearnablesWarning, match="watching has failed") as caught,
        ln.watch(model, optimizer, every=1, to=tmp_path, sinks=[Breaks(at, error)], budget=None),
    ):
        found = train(model, optimizer)
    assert len(caught) == 1
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert_equal(found)


STAGES = ("begin", "complete", "consumption", "Packed", "_walk", "pre_hooks_after")


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_bug_of_ours_anywhere_ends_the_watch_only(tmp_path, monkeypatch, name, at):
    model, optimizer = make()
    calls = iter(range(1, 10**6))
    whole = getattr(recorder, name)

    def broken(*args, **kwargs):
        if next(calls) >= at:
            raise RuntimeError("a bug")
        return whole(*args, **kwargs)

    watcher = ln.watch(model, optimizer, every=1, to=tmp_path, budget=None)
    # Hooks of others, before and after ours: torch raises where hooks change under its feet.
    optimizer.register_step_pre_hook(lambda *_: None)
    optimizer.register_step_post_hook(lambda *_: None)
    monkeypatch.setattr(recorder, name, broken)
    with pytest.warns(LearnablesWarning, match="a bug"):
        found = train(model, optimizer)
    watcher.close()
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert len(optimizer._optimizer_step_post_hooks) == 1
    assert_equal(found)


def test_a_full_disk_ends_the_watch_only(tmp_path):
    """SQLite's own "database or disk is full", from a database that may have no more pages."""
    model, optimizer = make()
    watcher = ln.watch(model, optimizer, every=1, to=tmp_path, budget=None)
    database = watcher._store._database
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.warns(LearnablesWarning, match="disk is full"):
        found = train(model, optimizer)
    watcher.close()
    assert_equal(found)


def small_files_only(folder, told):
    """Train where the system refuses to let a file grow beyond 150 kB, as a full disk does."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model, optimizer = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watcher = ln.watch(model, optimizer, every=1, to=folder, budget=None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
        found = train(model, optimizer)
        watcher.close()
    told.send(([str(w.message) for w in caught], [p.tolist() for p in found]))


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits as Linux has them")
def test_a_refused_write_ends_the_watch_only(tmp_path):
    messages, found = told_by(small_files_only, str(tmp_path))
    assert len(messages) == 1
    assert "cannot be written" in messages[0]
    assert found == [p.tolist() for p in unwatched()]
    assert Run(tmp_path).observations  # what came before is there


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for 300 kB; the options of a remount can be given."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root mounts a file system")
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=300k", *options]), "tmpfs", disk]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        return disk

    yield mount
    subprocess.run(["umount", "--lazy", disk], capture_output=True, check=False)


def test_a_disk_that_runs_full_in_mid_run_ends_the_watch_only(small_disk):
    model, optimizer = make()
    disk = small_disk()
    watcher = ln.watch(model, optimizer, every=1, to=disk / "run", budget=None)
    with pytest.warns(LearnablesWarning, match="cannot be written") as caught:
        found = train(model, optimizer, steps=400)
    watcher.close()
    assert len(caught) == 1
    assert 0 < watcher.step < 400
    assert shutil.disk_usage(disk).free < 5000
    seen = [o.step for o in Run(disk / "run").observations]
    assert seen == list(range(1, len(seen) + 1))  # all that were written before are there
    assert len(seen) >= watcher.step - 2
    plain = train(*make(), steps=400)
    torch.testing.assert_close(found, plain, rtol=0, atol=0)


def test_a_read_only_disk_is_an_error_before_training(small_disk):
    disk = small_disk("ro")
    with pytest.raises(RunError, match=r"cannot be written[\s\S]*Read-only"):
        ln.watch(*make(), to=disk / "run")


def test_a_database_that_turns_read_only_ends_the_watch_only(tmp_path):
    """SQLite's own refusal, as it gives it where a disk has been mounted anew without writing."""
    model, optimizer = make()
    watcher = ln.watch(model, optimizer, every=1, to=tmp_path, budget=None)

    def each(step):
        if step == 5:
            watcher._store._database.execute("PRAGMA query_only = ON")

    with pytest.warns(LearnablesWarning, match="readonly database"):
        found = train(model, optimizer, each=each)
    watcher.close()
    assert_equal(found)
    assert len(Run(tmp_path).observations) == 6


def test_a_tensorboard_disk_that_runs_full_ends_the_watch_only(small_disk, tmp_path):
    model, optimizer = make()
    sinks = [TensorBoard(small_disk() / "events")]
    watcher = ln.watch(model, optimizer, every=1, to=tmp_path / "run", sinks=sinks, budget=None)
    with pytest.warns(LearnablesWarning, match="No space left on device"):
        found = train(model, optimizer, steps=400)
    watcher.close()
    torch.testing.assert_close(found, train(*make(), steps=400), rtol=0, atol=0)


def test_a_folder_that_vanishes_ends_the_watch_only(tmp_path):
    model, optimizer = make()
    watcher = ln.watch(model, optimizer, every=1, to=tmp_path / "run", budget=None)

    def each(step):
        if step == 4:
            shutil.rmtree(tmp_path / "run")

    with pytest.warns(LearnablesWarning, match="moved or deleted"):
        found = train(model, optimizer, each=each)
    watcher.close()
    assert_equal(found)


def test_numbers_that_wait_for_a_folder_that_vanished_end_the_watch_only(tmp_path):
    model, optimizer = make()
    watcher = ln.watch(model, optimizer, every=1000, to=tmp_path / "run", budget=None)
    watcher._store._written = math.inf  # numbers wait for the end
    watcher.log_scalars(1, {"loss": 1.0})
    shutil.rmtree(tmp_path / "run")
    with pytest.warns(LearnablesWarning, match="moved or deleted"):
        watcher.close()
    assert isinstance(watcher.failed, RunError)


def test_a_locked_database_ends_the_watch_only(tmp_path):
    model, optimizer = make()
    watcher = ln.watch(model, optimizer, every=1, to=tmp_path, budget=None)
    watcher._store._database.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(watcher.path)
    other.execute("BEGIN IMMEDIATE")
    with pytest.warns(LearnablesWarning, match="locked"):
        found = train(model, optimizer)
    other.close()
    watcher.close()
    assert_equal(found)


def test_a_folder_that_cannot_be_made_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        ln.watch(*make(), to=tmp_path / "file" / "run")


def test_an_alarm_function_that_raises_is_heard(tmp_path):
    model, optimizer = make()

    def stop(alarm):
        raise KeyboardInterrupt

    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None, on_alarm=stop):
        model(torch.full((1, 8), math.nan)).sum().backward()
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()


# --- loops that do odd things --------------------------------------------------------------------


def test_two_watchers_on_one_optimizer_see_the_same(tmp_path):
    model, optimizer = make()
    with (
        ln.watch(model, optimizer, every=1, to=tmp_path / "a", budget=None) as a,
        ln.watch(model, optimizer, every=1, to=tmp_path / "b", budget=None) as b,
    ):
        found = train(model, optimizer)
    assert_equal(found)
    both = compare(a.run(), b.run())
    assert len(both.steps) == STEPS
    assert both.differences == ()


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_watchers_one_may_end_and_the_other_goes_on(tmp_path, first):
    model, optimizer = make()
    both = [ln.watch(model, optimizer, every=1, to=tmp_path / x, budget=None) for x in "ab"]

    def each(step):
        if step == 4:
            both[first].close()

    found = train(model, optimizer, each=each)
    both[1 - first].close()
    assert_equal(found)
    seen = [[o.step for o in watcher.run().observations] for watcher in both]
    assert seen[first] == list(range(1, 6))
    assert seen[1 - first] == list(range(1, STEPS + 1))
    assert {o.stage for o in both[1 - first].run().observations} == {"step"}
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_of_two_watchers_one_may_fail_and_the_other_goes_on(tmp_path):
    model, optimizer = make()
    breaks = [Breaks(3, KeyError("x"))]
    with (
        pytest.warns(LearnablesWarning, match="watching has failed"),
        ln.watch(model, optimizer, every=1, to=tmp_path / "a", sinks=breaks, budget=None) as a,
        ln.watch(model, optimizer, every=1, to=tmp_path / "b", budget=None) as b,
    ):
        found = train(model, optimizer)
    assert_equal(found)
    assert a.failed is not None
    assert b.failed is None
    assert len(b.run().observations) == STEPS


def test_a_parameter_that_comes_and_one_that_goes_are_followed(tmp_path):
    model, optimizer = make()
    late = nn.Parameter(torch.zeros(3))

    def each(step):
        if step == 3:
            model.late = late
            optimizer.add_param_group({"params": [late]})
        if step == 7:
            del model[2].bias
            model[2].register_parameter("bias", None)

    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        train(model, optimizer, each=each)
    assert watcher.failed is None
    seen = {o.step: o.names for o in watcher.run().observations}
    assert "late" not in seen[4]
    assert "late" in seen[5]
    assert "2.bias" in seen[8]
    assert "2.bias" not in seen[9]
    assert [p.name for p in watcher.run().parameters][-1] == "late"


def test_an_optimizer_that_is_swapped_leaves_a_hole_and_an_alarm(tmp_path):
    model, optimizer = make()
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        train(model, optimizer, steps=3)
        other = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4, 40):
            train(model, other, steps=1)
            watcher.log_scalars(step, {"loss": 0.0})
    assert [a.kind for a in watcher.alarms] == ["silent"]
    assert all(watcher.alarms[0].parts().values())
    ln.watch(model, other, to=None).close()  # what it says to type
    assert len(watcher.run().observations) == 3


def test_a_step_number_that_goes_back_is_kept_once(tmp_path):
    model, optimizer = make()
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        for step, loss in ((1, 3.0), (2, 2.0), (1, 9.0)):
            watcher.log_scalars(step, {"loss": loss})
    series = watcher.run().scalars["loss"]
    assert (series.steps.tolist(), series.values.tolist()) == ([1, 2], [9.0, 2.0])


def test_a_resumed_run_goes_on_counting(tmp_path):
    model, optimizer = make()
    with ln.watch(model, optimizer, every=2, to=tmp_path, budget=None):
        train(model, optimizer, steps=7)
    with ln.watch(model, optimizer, every=2, to=tmp_path, budget=None, step=5, resume=True) as w:
        train(model, optimizer, steps=4)
    assert [o.step for o in w.run().observations] == [1, 2, 4, 6, 8]
    assert w.run().gradient_norm.steps.tolist() == [1, 2, 3, 4, 6, 7, 8]


def test_a_look_that_two_optimizers_share_waits_for_both(tmp_path):
    model, _ = make()
    one = torch.optim.SGD(model[0].parameters(), lr=0.1)
    two = torch.optim.AdamW(model[2].parameters(), lr=0.1)
    with ln.watch(model, [one, two], every=2, to=tmp_path, budget=None) as watcher:
        for step in range(4):
            model(torch.randn(4, 8)).square().mean().backward()
            one.step()
            if step != 1:
                two.step()
    seen = watcher.run().observations
    assert [o.step for o in seen] == [1, 2, 4]
    assert [o.rows["update"].present.tolist() for o in seen] == [
        [True] * 4,
        [True, True, False, False],  # the second did not step then
        [True] * 4,
    ]


class Wrapper:
    """What Accelerate puts around an optimizer."""

    def __init__(self, optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups


@pytest.mark.parametrize("wrappers", [0, 1, 2])
@pytest.mark.parametrize(
    "module", ["deepspeed.runtime.zero.stage_1_and_2", "megatron.core.optimizer", "colossalai.zero"]
)
def test_an_engine_is_refused_however_it_is_wrapped(module, wrappers):
    """They hold a torch optimizer of copies, whose hooks would run."""
    model, _ = make()
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    engine = type("Engine", (Wrapper,), {"__module__": module})(torch.optim.SGD(copies, lr=0.1))
    for _ in range(wrappers):
        engine = Wrapper(engine)
    with pytest.raises(LearnablesError, match="gradients in buffers of its own") as caught:
        ln.watch(model, engine, to=None)
    assert f"{module}.Engine" in caught.value.found


def test_an_optimizer_that_is_wrapped_is_watched(tmp_path):
    model, optimizer = make()
    with ln.watch(model, Wrapper(Wrapper(optimizer)), every=1, to=tmp_path, budget=None) as watcher:
        train(model, optimizer, steps=2)
    assert len(watcher.run().observations) == 2


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_optimizer_of_other_parameters_is_refused(wrapped, tmp_path):
    """Built before the model was sharded, or of copies: nothing of what it does would be seen."""
    model, _ = make()
    _, other = make()
    with pytest.raises(LearnablesError, match="holds no parameter of this model") as caught:
        ln.watch(model, Wrapper(other) if wrapped else other, to=tmp_path)
    assert not list(tmp_path.iterdir())
    scope = {"torch": torch, "ln": ln, "model": model}
    exec(caught.value.mend, scope)
    ln.watch(model, [other, scope["optimizer"]], to=None).close()  # one that trains it is enough
