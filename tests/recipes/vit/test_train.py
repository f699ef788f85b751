import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import learnables as ln
import learnables.recipes.vit.train as recipe
from learnables.errors import AuditFailed, CheckpointError, LearnablesError, LearnablesWarning
from learnables.models.vit import ViT, ViTConfig
from learnables.recipes.vit import choose
from learnables.recipes.vit.crew import Crew
from learnables.recipes.vit.data import load_images
from learnables.recipes.vit.train import Job, new_folder, read_config, train
from learnables.runtime.checkpoint import read_checkpoint
from learnables.watching.run import Run

TOY = {
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "batch_size": 32,
    "epochs": 2,
    "max_steps": 6,
    "device": "cpu",
    "watch_every": 2,
}


def toy(**changes):
    return choose(changes={**TOY, **changes})


def run(folder, show=False, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    return train(toy(**changes), folder, show=show)


def weights(folder):
    return read_checkpoint(folder / "checkpoint.safetensors").model


def assert_same(a, b, **tolerance):
    torch.testing.assert_close(weights(a), weights(b), **(tolerance or {"rtol": 0, "atol": 0}))


# --- what a run leaves ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return run(folder, show=True)


def test_run_leaves_its_settings_database_events_checkpoint_and_report(plain):
    names = {path.name for path in plain.folder.iterdir()}
    wanted = {"config.json", "result.json", "checkpoint.safetensors", "model.safetensors"}
    assert wanted | {"report.html", "tensorboard", "run.db"} <= names
    assert read_config(plain.folder) == toy()
    assert json.loads((plain.folder / "result.json").read_text())["accuracy"] == plain.accuracy
    assert any((plain.folder / "tensorboard").iterdir())
    assert "color_matrix" in (plain.folder / "report.html").read_text()


def test_database_holds_curves_looks_and_pictures(plain):
    record = Run(plain.folder)
    assert {"loss/train", "lr", "accuracy/test"} <= set(record.scalars)
    assert record.scalars["accuracy/test"].values[-1] == plain.accuracy
    assert {"positions.table", "class_token.tokens"} <= {p.name for p in record.parameters}
    assert record.observations
    confusion = record.artifact("confusion").arrays()["values"]
    assert confusion.shape == (10, 10)
    assert confusion.trace() / confusion.sum() == pytest.approx(plain.accuracy)
    assert record.artifact("position similarity").arrays()["values"].shape == (4, 4, 4, 4)
    assert any(a.name.startswith("weight blocks.0.") for a in record.artifacts)
    assert "weight blocks.0." in (plain.folder / "report.html").read_text()
    assert len(record.artifact("misclassified").arrays()["pixels"])
    assert record.artifact("audit").document()["ok"] is True


def test_kept_model_is_whole_and_gives_the_accuracy_that_was_reported(plain):
    kept = read_checkpoint(plain.folder / "model.safetensors")
    model = ViT(ViTConfig(**{**kept.extra["model"], "image_size": (8, 8)}))
    model.load_state_dict(kept.model)
    test = load_images("digits").test
    guess = model.eval()(test.images.float() / 255).argmax(1)
    assert (guess == test.labels).float().mean().item() == pytest.approx(plain.accuracy)


def test_two_runs_are_equal_and_another_seed_is_not(plain, tmp_path):
    run(tmp_path / "again")
    assert_same(tmp_path / "again", plain.folder)
    run(tmp_path / "other", seed=1)
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "other", plain.folder)


def test_neither_audit_nor_watch_changes_what_is_trained(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.Job, "audit", lambda self, done: recipe.Report([]))
    run(tmp_path, watch_every=0)
    assert_same(tmp_path, plain.folder)


# --- the audit stands at the door -----------------------------------------------------------------


def test_model_that_would_not_train_is_refused_before_the_first_step(tmp_path, monkeypatch):
    def forgetful(model, **options):
        model.class_token.tokens.requires_grad_(False)
        groups = whole(model, **options)
        model.class_token.tokens.requires_grad_(True)
        return groups

    whole = recipe.param_groups
    monkeypatch.setattr(recipe, "param_groups", forgetful)
    with pytest.raises(AuditFailed, match=r"LRN201[\s\S]*class_token\.tokens"):
        run(tmp_path)
    assert not list(tmp_path.iterdir())


# --- the same answer, however it is computed ------------------------------------------------------


def test_micro_batches_give_the_same_steps(plain, tmp_path):
    run(tmp_path, accumulate=4, max_steps=3)
    run(tmp_path / "whole", max_steps=3)
    assert_same(tmp_path, tmp_path / "whole", rtol=0, atol=2e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_nearly_the_same(tmp_path, precision):
    losses = {}
    for name in ("fp32", precision):
        assert run(tmp_path / name, precision=name, max_steps=30).finished
        losses[name] = Run(tmp_path / name).scalars["loss/train"].values[-1]
        assert all(x.dtype is torch.float32 for x in weights(tmp_path / name).values())
    assert 0 < abs(losses["fp32"] - losses[precision]) < 0.05


def test_every_switch_at_once_trains_and_resumes(tmp_path):
    """Registers, LayerScale, stochastic depth, qk-norm, mixing, erasing, averaging, scaling."""
    switches = {
        "registers": 2,
        "layer_scale": 0.1,
        "drop_path": 0.2,
        "qk_norm": True,
        "pool": "mean",
        "stem": "patch",
        "flip": True,
        "erase": 0.3,
        "mixup": 0.2,
        "cutmix": 1.0,
        "ema": 0.9,
        "precision": "fp16",
        "accumulate": 2,
    }
    run(tmp_path / "whole", **switches)
    stop_after(3, lambda: run(tmp_path / "cut", **switches))
    done = train(read_config(tmp_path / "cut"), tmp_path / "cut", resume=True, show=False)
    assert done.finished
    assert_same(tmp_path / "cut", tmp_path / "whole")
    for name in ("whole", "cut"):
        also = read_checkpoint(tmp_path / name / "checkpoint.safetensors").meta["also"]
        assert set(also) == {"average", "scaler"}
    a, b = (read_checkpoint(tmp_path / n / "model.safetensors").model for n in ("whole", "cut"))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(AssertionError):  # the average is not the last value
        torch.testing.assert_close(a, weights(tmp_path / "whole"), rtol=0, atol=0)


def stop_after(steps, action):
    """Press Ctrl-C in this very process after some steps."""
    real = recipe.Job.step

    def step(job, number):
        loss = real(job, number)
        if number + 1 == steps and signal.getsignal(signal.SIGINT) is not before:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    before = signal.getsignal(signal.SIGINT)
    recipe.Job.step = step
    try:
        result = action()
    finally:
        recipe.Job.step = real
    assert not result.finished
    assert result.steps == steps


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def command(out, *more, **changes):
    settings = [f"--set={k}={v}" for k, v in {**TOY, **changes}.items() if k != "device"]
    return ["-m", "learnables", "train", "vit", f"--out={out}", "--device=cpu", *settings, *more]


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **more}


@pytest.mark.parametrize(
    ("strategy", "more"), [("ddp", {}), ("fsdp2", {"ema": 0.9, "accumulate": 2})]
)
def test_two_processes_train_as_one(tmp_path, strategy, more):
    mixed = {"mixup": 0.4, "cutmix": 0.5, "max_steps": 3, **more}
    done = subprocess.run(
        [*TORCHRUN, *command(tmp_path / "two", f"--strategy={strategy}", **mixed)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("test accuracy") == 1
    run(tmp_path / "one", **mixed)
    assert_same(tmp_path / "two" / "digits", tmp_path / "one", rtol=0, atol=2e-4)
    kept = [read_checkpoint(tmp_path / n / "model.safetensors") for n in ("two/digits", "one")]
    torch.testing.assert_close(kept[0].model, kept[1].model, rtol=0, atol=2e-4)


# --- interruptions --------------------------------------------------------------------------------


def test_ctrl_c_in_a_terminal_and_resume_end_as_if_nothing_had_been(tmp_path):
    long = {"max_steps": 70, "epochs": 9}
    run(tmp_path / "whole", **long)
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, *command(tmp_path, **long)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment(TERM="xterm-256color"),
        start_new_session=True,
    ) as process:
        os.close(follower)
        wait_for(tmp_path / "digits" / "run.db", process)
        process.send_signal(signal.SIGINT)
        seen = read_to_the_end(leader)
        assert process.wait(60) == 130, seen
    assert "--resume" in seen
    if "\x1b[?25l" in seen:  # the bar hides the cursor
        assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
    stopped = read_checkpoint(tmp_path / "digits" / "checkpoint.safetensors")
    assert 0 < stopped.step < 70

    again = [sys.executable, "-m", "learnables", "train", "vit", f"--resume={tmp_path / 'digits'}"]
    subprocess.run([*again, "--device=cpu"], env=environment(), check=True, capture_output=True)
    assert_same(tmp_path / "digits", tmp_path / "whole")
    steps = Run(tmp_path / "digits").scalars["accuracy/test"].steps.tolist()
    assert steps == Run(tmp_path / "whole").scalars["accuracy/test"].steps.tolist()


def test_killed_run_resumes_from_its_last_checkpoint(tmp_path):
    long = {"max_steps": 60, "epochs": 9, "batch_size": 128, "save_seconds": 0}
    checkpoint = tmp_path / "digits" / "checkpoint.safetensors"
    with subprocess.Popen(
        [sys.executable, *command(tmp_path, **long)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        wait_for(checkpoint, process)
        while read_checkpoint(checkpoint).step == 0 and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    assert read_checkpoint(checkpoint).step > 0
    train(read_config(checkpoint.parent), checkpoint.parent, resume=True, show=False)
    run(tmp_path / "whole", **long)
    assert_same(checkpoint.parent, tmp_path / "whole")


@pytest.mark.slow  # three times two processes
def test_ctrl_c_reaches_all_processes_and_they_resume_together(tmp_path):
    long = {"max_steps": 60, "epochs": 9}
    run(tmp_path / "whole", **long)
    with subprocess.Popen(
        [*TORCHRUN, *command(tmp_path, **long)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        wait_for(tmp_path / "digits" / "run.db", process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everyone at once
        said = process.communicate(timeout=120)[0]
    assert "go on with" in said, said[-3000:]
    assert 0 < read_checkpoint(tmp_path / "digits" / "checkpoint.safetensors").step < 60
    again = ["-m", "learnables", "train", "vit", f"--resume={tmp_path / 'digits'}", "--device=cpu"]
    subprocess.run([*TORCHRUN, *again], env=environment(), check=True, capture_output=True)
    assert_same(tmp_path / "digits", tmp_path / "whole", rtol=0, atol=2e-3)


@pytest.mark.slow  # a process dies, and two start anew, as often as `kills` says
@pytest.mark.parametrize(("strategy", "kills"), [("ddp", 1), ("fsdp2", 1), ("fsdp2", 25)])
def test_restarted_after_kill_9_no_step_is_lost_or_done_twice(tmp_path, strategy, kills):
    long = {"batch_size": 128, "epochs": 999, "max_steps": 40 + 20 * kills, "save_seconds": 0}
    chance = random.Random(kills)
    whole = [*TORCHRUN, *command(tmp_path / "whole", f"--strategy={strategy}", **long)]
    subprocess.run(whole, env=environment(), check=True, capture_output=True)
    launch = [*TORCHRUN, f"--max-restarts={kills}", "--monitor-interval=0.1"]
    again = [*launch, *command(tmp_path / "cut", f"--strategy={strategy}", **long)]
    with (
        (tmp_path / "said.txt").open("w") as said,
        subprocess.Popen(
            again, env=environment(), stdout=said, stderr=said, start_new_session=True
        ) as process,
    ):
        try:
            folder, dead = tmp_path / "cut" / "digits", set()
            wait_for(folder / "config.json", process)
            for _ in range(kills):
                workers = wait_for_workers(process, dead)
                time.sleep(chance.uniform(0, 10))
                if process.poll() is not None:
                    break
                dead |= set(workers)
                with suppress(ProcessLookupError):
                    os.kill(workers[chance.randrange(2)], signal.SIGKILL)
            code = process.wait(120)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert code == 0, (tmp_path / "said.txt").read_text()[-3000:]
    assert dead, "the run was over before a process could be killed"
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["digits"]
    assert_same(folder, tmp_path / "whole" / "digits")
    cut, uncut = Run(folder), Run(tmp_path / "whole" / "digits")
    for name in ("loss/train", "lr", "accuracy/test"):
        assert cut.scalars[name].steps.tolist() == uncut.scalars[name].steps.tolist(), name
        assert cut.scalars[name].values.tolist() == uncut.scalars[name].values.tolist(), name
    steps = [observation.step for observation in cut.observations]
    assert steps == sorted(set(steps))


def wait_for_workers(process, dead, seconds=60):
    """The two processes that torchrun has started since those that are dead.

    Raises:
        AssertionError: It has not.
    """
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        alive = [int(word) for word in children.read_text().split()]
        if len(alive) == 2 and not dead & set(alive):
            return alive
        time.sleep(0.02)
    raise AssertionError("torchrun has not started two processes anew")


def wait_for(path, process, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < end
        time.sleep(0.02)


def read_to_the_end(descriptor):
    parts = []
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # EIO: the other side has gone
            part = b""
        if not part:
            os.close(descriptor)
            return b"".join(parts).decode()
        parts.append(part)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["config.json", "checkpoint.safetensors"])
def test_resuming_a_damaged_run_says_so(plain, tmp_path, damage):
    for name in ("config.json", "checkpoint.safetensors"):
        content = (plain.folder / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-20] if name == damage else content)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        train(read_config(tmp_path), tmp_path, resume=True, show=False)
    assert str(tmp_path / damage) in str(caught.value)


def test_resuming_with_another_model_lists_the_names(plain, tmp_path):
    for name in ("config.json", "checkpoint.safetensors"):
        (tmp_path / name).write_bytes((plain.folder / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.0\.weight") as caught:
        train(toy(dim=24), tmp_path, resume=True, show=False)
    assert "mis-shaped" in caught.value.found


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no run to resume"):
        read_config(tmp_path)


def test_disk_that_is_full_for_a_while_does_not_end_the_run(disk_of, monkeypatch, capsys):
    """A real disk of 2 MB; watching ends with a warning, training and the last save do not."""
    tiny_disk = disk_of("2m")
    filler, real = tiny_disk / "filler", recipe.Job.step
    short = {"batch_size": 256, "epochs": 3, "max_steps": 0, "save_seconds": 0}  # 3 × 5 steps

    def step(job, number):
        if number == 3:
            with pytest.raises(OSError, match="No space left"):
                filler.write_bytes(bytes(2 << 20))
        if number == 12:
            filler.unlink()
        return real(job, number)

    run(tiny_disk.parent / "roomy", **short)
    monkeypatch.setattr(recipe.Job, "step", step)
    monkeypatch.setattr(recipe.Job, "audit", lambda self, done: recipe.Report([]))
    with pytest.warns(LearnablesWarning, match="watching has failed"):
        result = run(tiny_disk / "run", show=True, **short)
    assert result.finished
    assert "the checkpoint cannot be written" in capsys.readouterr().out
    assert_same(tiny_disk / "run", tiny_disk.parent / "roomy")


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"batch_size": 2000}, "--batch-size 359"),
        ({"batch_size": 30, "accumulate": 4}, "--batch-size 32"),
        ({"batch_size": 33, "mixup": 0.1}, "--batch-size 34"),
    ],
)
def test_batch_that_cannot_be_cut_is_refused_with_one_that_can(tmp_path, changes, mend):
    with pytest.raises(LearnablesError) as caught:
        run(tmp_path, **changes)
    assert mend in caught.value.mend


def test_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(LearnablesError, match="not finite"):
        run(tmp_path, lr=1e30, clip=0, warmup=0, max_steps=40, epochs=2)


def test_names_that_are_taken_get_a_number(tmp_path):
    names = [new_folder(tmp_path, "demo").name for _ in range(3)]
    assert names == ["demo", "demo-2", "demo-3"]
    (tmp_path / "file").write_text("")
    with pytest.raises(LearnablesError, match="cannot be made"):
        new_folder(tmp_path / "file", "demo")


def test_few_epochs_are_enough_to_read_most_digits(tmp_path):
    result = train(choose(changes={"epochs": 6, "device": "cpu"}), tmp_path, show=False)
    assert result.accuracy > 0.75  # 98 % after the preset's 60; a tenth is chance


@pytest.mark.parametrize("preset", ["fashion-mnist", "fashion-mnist-gpu"])
def test_presets_of_fashion_mnist_run_dry(tmp_path, preset):
    for prefix, count in (("train", 40), ("t10k", 10)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            values = torch.randint(0, 10, shape, dtype=torch.uint8)
            sizes = b"".join(size.to_bytes(4, "big") for size in shape)
            content = bytes([0, 0, 8, len(shape)]) + sizes + values.numpy().tobytes()
            (tmp_path / f"{prefix}-{kind}-ubyte").write_bytes(content)
    changes = {"data_dir": str(tmp_path), "batch_size": 8, "max_steps": 2, "device": "cpu"}
    result = train(choose(preset=preset, changes=changes), tmp_path / "run", show=False)
    assert result.finished
    assert result.steps == 2


@pytest.mark.slow  # the compiler
def test_compiled_model_trains_the_same(plain, tmp_path):
    run(tmp_path, compile=True)
    assert_same(tmp_path, plain.folder, rtol=0, atol=2e-4)


def test_a_model_with_block_sparse_mlps_trains_and_its_blocks_move():
    config, images = toy(), load_images("digits")
    job = Job(
        config,
        Crew(torch.device("cpu")),
        images,
        lambda model: ln.sparsify(
            model, "blocks.*.mlp.*.weight", block=8, density=0.25, mask="random", draw=True
        ),
    )
    layers = [m for m in job.model.modules() if isinstance(m, ln.nn.BlockSparseLinear)]
    assert len(layers) == 2 * config.depth
    held = {id(p) for group in job.optimizer.param_groups for p in group["params"]}
    assert {id(layer.weight) for layer in layers} <= held
    with ln.sparse.evolve(job.model, job.optimizer, ln.sparse.RigL(1.0), every=2) as evolution:
        losses = [float(job.step(step)) for step in range(6)]
    assert losses[-1] < losses[0]
    assert sum(change.grown for change in evolution.history) > 0
    assert all(layer.density == pytest.approx(0.25) for layer in layers)
    assert 0 <= job.measure().accuracy <= 1
