import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from learnables.errors import RunError
from learnables.watching.run import Run
from learnables.watching.schema import APPLICATION_ID, COLUMNS, CREATE, STEPS, VERSION
from learnables.watching.store import Store


def test_what_is_written_is_read(tmp_path):
    store = Store(tmp_path, meta={"note": "x"})
    store.add_scalars(1, {"loss": 2.0, "odd": float("nan")})
    store.add_scalars(3, {"loss": 1.0})
    store.flush()
    run = Run(tmp_path)  # while it is being written
    assert run.scalars["loss"].steps.tolist() == [1, 3]
    assert np.isnan(run.scalars["odd"].values[0])
    store.close()
    assert Run(tmp_path).meta["note"] == "x"
    assert not run.damage


def test_two_writers_in_one_folder_get_a_file_each(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    assert first.path != second.path
    first.add_scalars(1, {"a": 1.0})
    second.add_scalars(1, {"a": 2.0})
    first.flush()
    second.flush()
    assert Run(first.path).scalars["a"].values[0] == 1.0
    assert Run(tmp_path).scalars["a"].values[0] == 2.0


def test_numbers_wait_for_a_second_or_for_something_else_to_write(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr("learnables.watching.store.time.monotonic", lambda: now)
    store = Store(tmp_path)
    store.add_scalars(1, {"a": 1.0})
    assert not Run(tmp_path).scalars
    now += 1.0
    store.add_scalars(2, {"a": 2.0})
    assert Run(tmp_path).scalars["a"].steps.tolist() == [1, 2]
    store.add_scalars(3, {"a": 3.0})
    store.add_artifact(3, "audit", "document", b"{}")
    assert Run(tmp_path).scalars["a"].steps.tolist() == [1, 2, 3]
    store.close()
    assert not Run(tmp_path).damage


def test_what_waits_is_written_by_a_process_that_ends_without_a_word(tmp_path):
    code = (
        "import sys; from learnables.watching.store import Store; "
        "Store(sys.argv[1]).add_scalars(1, {'a': 1.0})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert Run(tmp_path).scalars["a"].values.tolist() == [1.0]


def test_a_resumed_run_reads_as_one(tmp_path):
    first = Store(tmp_path)
    for step in (1, 2, 3, 4):
        first.add_scalars(step, {"a": step})
    first.close()
    second = Store(tmp_path, resume=True)
    for step in (3, 4, 5):
        second.add_scalars(step, {"a": 10 * step})
    second.close()
    assert Run(tmp_path).scalars["a"].values.tolist() == [1, 2, 30, 40, 50]


def test_what_is_said_of_a_checkpoint_does_not_hide_the_numbers_of_its_step(tmp_path):
    first = Store(tmp_path)
    for step in (1, 2, 3, 4):
        first.add_scalars(step, {"a": step})
    first.close()
    for _ in range(2):  # the first attempt dies before it has done a step
        store = Store(tmp_path, meta={"begins_after": 2}, resume=True)
        store.add_artifact(2, "audit", "document", b"{}")
        store.close()
    assert Run(tmp_path).scalars["a"].values.tolist() == [1, 2]
    store = Store(tmp_path, meta={"begins_after": 2}, resume=True)
    store.add_scalars(4, {"a": 40})
    store.close()
    run = Run(tmp_path)
    assert run.scalars["a"].steps.tolist() == [1, 2, 4]
    assert run.scalars["a"].values.tolist() == [1, 2, 40]


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        Run(tmp_path)


def test_a_run_lasts_until_what_it_wrote_last_of_whatever_kind(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("learnables.watching.store.time.time", lambda: now)
    store = Store(tmp_path)
    now += 20.0
    store.add_artifact(1, "audit", "document", b"{}")
    assert Run(tmp_path).seconds == 20.0
    now += 5.0
    store.add_scalars(9, {"loss": 1.0})
    store.close()
    assert Run(tmp_path).seconds == 25.0


def test_the_steps_that_were_done_are_told_with_whatever_is_written(tmp_path):
    """They were those of the last look, however long ago that was."""
    store = Store(tmp_path)
    assert Run(tmp_path).steps == 0
    store.steps = 7
    store.add_artifact(0, "note", "document", b"{}")
    assert Run(tmp_path).steps == 7
    store.steps = 9
    store.add_scalars(100, {"images seen": 1.0})  # by whatever a loop counts
    store.close()
    assert Run(tmp_path).steps == 9
    assert not Run(tmp_path).damage


def test_a_run_that_goes_on_from_an_earlier_step_has_done_no_more(tmp_path):
    first = Store(tmp_path)
    first.steps = 40
    first.add_scalars(1, {"a": 1.0})
    first.close()
    second = Store(tmp_path, meta={"begins_after": 20}, resume=True)
    assert Run(tmp_path).steps == 40  # as far as anybody has told
    second.steps = 25
    second.add_scalars(25, {"a": 2.0})
    second.close()
    assert Run(tmp_path).steps == 25


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_of_the_schema_names_every_table_and_column(language):
    page = (Path(__file__).parents[2] / f"docs/{language}/run-database.md").read_text("utf-8")
    assert re.search(rf"^## .*{VERSION}$", page, re.MULTILINE)
    assert f"0x{APPLICATION_ID:X}" in page
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    created = dict(re.findall(r"CREATE TABLE (\w+) \((.*?)\);", CREATE, re.DOTALL))
    assert set(created) == {*COLUMNS, "tally"}
    for table, columns in COLUMNS.items():
        assert re.findall(r"`(\w+)`", re.sub(r"[(（].*?[)）]", "", rows[table]))[
            : len(columns)
        ] == [*columns]
        assert re.findall(r"(\w+) (?:INTEGER|TEXT|REAL|BLOB)", created[table]) == [
            *("seq", *columns, "crc")
        ]
    assert f"`{STEPS}`" in rows["tally"]


def test_writers_that_begin_in_one_folder_at_once_get_a_file_each(tmp_path):
    """Four processes, all waiting for the same file to appear."""
    code = (
        "import sys, pathlib\n"
        "from learnables.watching.store import Store\n"
        "print('ready', flush=True)\n"
        "while not pathlib.Path(sys.argv[1], 'go').exists(): pass\n"
        "store = Store(sys.argv[1])\n"
        "for step in range(50):\n"
        "    store.add_scalars(step, {sys.argv[2]: step})\n"
        "    store.flush()\n"
        "store.close()\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    writers = [
        subprocess.Popen([*command, f"by {i}"], stdout=subprocess.PIPE, text=True) for i in range(4)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    for writer in writers:
        writer.communicate(timeout=120)
    assert [writer.returncode for writer in writers] == [0] * 4
    runs = [Run(path) for path in sorted(tmp_path.glob("run*.db"))]
    assert len(runs) == 4
    assert sorted(name for run in runs for name in run.scalars) == [f"by {i}" for i in range(4)]
    for run in runs:
        assert not run.damage
        assert next(iter(run.scalars.values())).values.tolist() == list(range(50))


def test_what_was_flushed_outlives_a_kill(tmp_path):
    """The look and the numbers of before the checkpoint, though no second has gone by."""
    code = (
        "import os, signal, sys, torch, learnables as ln\n"
        "model = torch.nn.Linear(2, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "watcher = ln.watch(model, optimizer, every=100, to=sys.argv[1])\n"
        "for step in range(1, 6):\n"
        "    model(torch.ones(1, 2)).sum().backward()\n"
        "    optimizer.step()\n"
        "    watcher.log_scalars(step, {'loss': step})\n"
        "    if step == 4 and sys.argv[2] == 'flushed':\n"
        "        watcher.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    seen = {}
    for how in ("flushed", "not"):
        command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / how), how]
        assert subprocess.run(command).returncode == -signal.SIGKILL
        run = Run(tmp_path / how)
        seen[how] = [len(run.observations), len(run.scalars["loss"].steps) if run.scalars else 0]
    assert seen["flushed"] == [1, 4]
    assert seen["not"][1] < 4
