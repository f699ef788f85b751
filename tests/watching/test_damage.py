"""What a run database goes through: killed writers, flipped bits, cut files, strangers' files."""

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.watching.writer import CONTEXT, write
from torch import nn

import learnables as ln
from learnables.errors import RunError
from learnables.watching import Run
from learnables.watching.schema import VERSION
from learnables.watching.store import Store
from learnables.watching.wal import faults


def everything(path: Path) -> dict[str, object]:
    """All that a run holds, in a form that compares by ==; and what is wrong with it."""
    run = Run(path)
    seen = {
        "meta": run.meta,
        "steps": run.steps,
        "parameters": run.parameters,
        "alarms": run.alarms,
        "artifacts": [(a.step, a.time, a.name, a.kind, a.data) for a in run.artifacts],
        "scalars": {
            n: (s.steps.tolist(), s.values.tobytes()) for n, s in sorted(run.scalars.items())
        },
        "observations": [
            (
                (o.step, o.time, o.names, o.stage, o.skipped, o.scale, o.every, o.seconds, o.skips),
                {q: {k: v.tolist() for k, v in r.moments.items()} for q, r in o.rows.items()},
                {q: r.histogram.tobytes() for q, r in o.rows.items()},
                {k: v.tobytes() for k, v in o.columns.items()},
                o.norms.tobytes(),
            )
            for o in run.observations
        ],
    }
    return {**seen, "damage": run.damage}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A small run with something in every table, closed."""
    folder = tmp_path_factory.mktemp("sound")
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ln.watch(model, optimizer, every=1, to=folder, budget=None) as watcher:
        for step in range(12):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            if step == 9:
                model.bias.grad[0] = float("nan")
            optimizer.step()
            watcher.log_scalars(watcher.step, {"loss": step / 3, "accuracy": 0.1 * step})
        watcher.log_table("confusion", np.eye(3), 12)
        watcher.log_document("config", {"lr": 0.1})
    return folder / "run.db"


@pytest.fixture(scope="module")
def unfinished(sound, tmp_path_factory) -> Path:
    """The same, as it lies there when the writer was killed: the newest rows in the log only."""
    path = tmp_path_factory.mktemp("unfinished") / "run.db"
    store = Store(path.parent, meta={"note": "killed"})
    for step in range(1, 30):
        store.add_scalars(step, {"loss": step / 7})
        store.flush()
    killed = tmp_path_factory.mktemp("killed")
    for file in path.parent.glob("run.db*"):
        if not file.name.endswith("-shm"):
            shutil.copy(file, killed / file.name)
    store.close()
    assert (killed / "run.db-wal").stat().st_size > 10_000
    return killed / "run.db"


# --- flipped bits and cut files -----------------------------------------------------------------


def survives(source: Path, folder: Path, draw: random.Random) -> str:
    """Damage a copy at random; what is shown must be what was written, or be said to be damaged."""
    truth = everything(source)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files = [f for f in source.parent.glob("run.db*") if not f.name.endswith("-shm")]
    for file in files:
        shutil.copy(file, folder / file.name)
    victim = folder / draw.choice([f.name for f in files if f.stat().st_size])
    raw = bytearray(victim.read_bytes())
    kind = draw.choice(["flip", "flip", "flip", "cut", "zero", "copy"])
    at = draw.randrange(len(raw))
    if kind == "flip":
        raw[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del raw[at:]
    elif kind == "zero":
        raw[at : at + 512] = bytes(len(raw[at : at + 512]))
    else:
        other = draw.randrange(len(raw))
        block = raw[other : other + 512]
        raw[at : at + len(block)] = block
        del raw[victim.stat().st_size :]
    victim.write_bytes(raw)
    try:
        shown = everything(folder / source.name)
    except RunError:
        return "refused"
    if shown.pop("damage"):
        assert_no_lie(shown, truth)
        return "said to be damaged"
    truth = {k: v for k, v in truth.items() if k != "damage"}
    assert shown == truth, f"{kind} at {at} of {victim.name} went unnoticed"
    return "harmless"


def assert_no_lie(shown, truth):
    """Less than was written may be shown, never anything else."""
    assert shown["steps"] <= truth["steps"]
    for key, value in shown["meta"].items():
        assert truth["meta"][key] == value
    for table in ("parameters", "alarms", "artifacts", "observations"):
        for row in shown[table]:
            assert row in truth[table], table
    for name, (steps, values) in shown["scalars"].items():
        whole = dict(
            zip(truth["scalars"][name][0], np.frombuffer(truth["scalars"][name][1]), strict=True)
        )
        for step, value in zip(steps, np.frombuffer(values), strict=True):
            assert whole[step] == value


@pytest.mark.parametrize("kind", ["sound", "unfinished"])
def test_damage_is_detected_or_harmless(kind, request, tmp_path):
    source, draw = request.getfixturevalue(kind), random.Random(1)
    fates = [survives(source, tmp_path / "copy", draw) for _ in range(25)]
    assert len(set(fates)) > 1, fates  # so the draw has reached more than padding


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sound", "unfinished"])
def test_damage_is_detected_or_harmless_1000_times(kind, request, tmp_path):
    source, draw = request.getfixturevalue(kind), random.Random(2)
    for _ in range(1000):
        survives(source, tmp_path / "copy", draw)


def test_text_that_is_no_utf8_any_more_is_said_to_be_damaged(sound, tmp_path):
    raw = sound.read_bytes()
    at = raw.index(b"the gradient is not finite")
    (tmp_path / "run.db").write_bytes(raw[:at] + b"\xcb" + raw[at + 1 :])
    run = Run(tmp_path / "run.db")
    assert run.damage == ["run.db, alarms: row 1 fails its checksum"]
    assert not run.alarms


def test_half_a_frame_over_one_of_an_earlier_turn_is_the_end_of_a_killed_writer(tmp_path):
    """A writer that is killed between a frame's header and its page, after the log began anew."""
    path = tmp_path / "log.db"
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA wal_autocheckpoint=0")
    database.execute("CREATE TABLE t (x)")
    for i in range(20):
        database.execute("INSERT INTO t VALUES (?)", ("a" * 3000 + str(i),))
    database.execute("PRAGMA wal_checkpoint(RESTART)")  # the next write starts at the front
    log = tmp_path / "log.db-wal"
    old = log.read_bytes()
    database.execute("INSERT INTO t VALUES ('new')")
    new = log.read_bytes()
    kept = tmp_path / "kept-wal"
    kept.write_bytes(new)
    assert faults(kept) == []
    last = max(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    frame = (last - 32) // (24 + 4096)
    at = 32 + frame * (24 + 4096) + 24
    kept.write_bytes(new[:at] + old[at:])
    database.close()
    assert faults(kept) == [
        "kept-wal: the log ends in the middle of a write; what was written last may be missing"
    ]


# --- killed writers -------------------------------------------------------------------------------


def kill_once(folder: Path, after: float) -> None:
    """Kill a training at a random moment; no look that the loop went past is lost.

    Of the losses those that came after the last look may be, for at most a second.
    """
    ours, theirs = CONTEXT.Pipe(duplex=False)
    writer = CONTEXT.Process(target=write, args=(str(folder), theirs))
    writer.start()
    theirs.close()
    told = [ours.recv()]
    time.sleep(after)
    os.kill(writer.pid, signal.SIGKILL)
    with contextlib.suppress(EOFError):
        while True:
            told.append(ours.recv())
    writer.join()
    ours.close()
    run = Run(folder)
    assert all("in the middle of a write" in line for line in run.damage), run.damage
    steps = [o.step for o in run.observations]
    assert steps == list(range(1, len(steps) + 1))
    losses = run.scalars["loss"].values.tolist() if run.scalars else []
    assert losses == [float(step) for step in range(1, len(losses) + 1)]
    assert len(steps) >= told[-1]
    assert len(losses) >= told[-1] - 1
    ln.write_html(run, folder / "report.html")


def test_a_killed_run_is_whole(tmp_path):
    for i, after in enumerate((0.0, 0.02, 0.3)):
        kill_once(tmp_path / str(i), after)


@pytest.mark.slow
def test_200_killed_runs_are_whole(tmp_path):
    draw = random.Random(0)
    for i in range(200):
        kill_once(tmp_path / str(i), draw.uniform(0.0, 0.5))


# --- files of strangers ---------------------------------------------------------------------------


def test_a_newer_schema_is_refused_with_what_to_type(sound, tmp_path):
    copy = tmp_path / "run.db"
    shutil.copy(sound, copy)
    with sqlite3.connect(copy) as database:
        database.execute(f"PRAGMA user_version = {VERSION + 1}")
    database.close()
    with pytest.raises(RunError, match="pip install --upgrade learnables"):
        Run(copy)


@pytest.mark.parametrize(
    "content",
    [b"", b"SQLite format 3\0" + b"x" * 4096, b"hello", random.Random(0).randbytes(9000)],
    ids=["empty", "only a header", "text", "noise"],
)
def test_what_is_no_run_database_is_refused(content, tmp_path):
    path = tmp_path / "run.db"
    path.write_bytes(content)
    with pytest.raises(RunError):
        Run(path)


def test_another_program_s_database_is_refused(tmp_path):
    path = tmp_path / "run.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE t (x)")
    database.close()
    with pytest.raises(RunError, match="no run database"):
        Run(path)


def test_a_closed_run_is_read_from_a_folder_that_cannot_be_written(sound, tmp_path):
    shutil.copy(sound, tmp_path / "run.db")
    (tmp_path / "run.db").chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        assert everything(tmp_path / "run.db") == everything(sound)
        assert [f.name for f in tmp_path.iterdir()] == ["run.db"]
    finally:
        tmp_path.chmod(0o755)
