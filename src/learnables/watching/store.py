"""Write a run database: one SQLite file in WAL mode per run, appended to, never reopened."""

import atexit
import json
import math
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import final

import numpy as np

from learnables.errors import RunError
from learnables.watching.alarm import Alarm
from learnables.watching.encoding import pack
from learnables.watching.observation import Observation, to_arrays
from learnables.watching.schema import (
    APPLICATION_ID,
    COLUMNS,
    CREATE,
    STEPS,
    SUFFIX,
    VERSION,
    Value,
    checksum,
)

_PATIENCE = 1.0  # seconds that scalars wait for another transaction, at most


@final
class Store:
    """The one writer of one new run database.

    Each call is one transaction: after it returns, a killed process loses nothing of it, the
    scalars of the last second excepted. A second writer in the same folder gets a file of its own
    (``run-2.db``), so that writers never collide.

    Args:
        folder: Where the file goes; made where it is not there.
        meta: JSON values to begin with.
        resume: Continue the newest run of the folder: the new file says so, and readers show the
            two as one, with the newer file's numbers from its first step on, or from the step after
            ``meta["begins_after"]``.

    Raises:
        RunError: The folder cannot be made or written, or ``resume`` finds no run.

    Example:
        >>> from tempfile import mkdtemp
        >>> from learnables.watching.run import Run
        >>> folder = mkdtemp()
        >>> store = Store(folder)
        >>> store.add_scalars(1, {"loss": 2.5})
        >>> store.close()
        >>> Run(folder).scalars["loss"].values
        array([2.5])
    """

    def __init__(
        self,
        folder: "str | os.PathLike[str]",
        meta: Mapping[str, object] | None = None,
        resume: bool = False,
    ) -> None:
        folder = Path(folder)
        started: dict[str, object] = {
            "schema": VERSION,
            "run": uuid.uuid4().hex,
            "started": time.time(),
            **(meta or {}),
        }
        if resume:
            previous = newest(folder)
            started["continues"] = previous.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = _claim(folder)
            self._identity = _identity(self.path)
            self._database = _create(self.path)
        except (OSError, sqlite3.Error) as error:
            raise RunError(
                "the run database cannot be written",
                where=str(folder),
                found=f"{type(error).__name__}: {error}",
                wanted="a folder that can be written to",
                mend='ln.watch(model, optimizer, to="another/folder")',
            ) from error
        self.steps = 0  # that the optimizer has done: told with whatever is written next
        self._rows = dict.fromkeys(COLUMNS, 0)
        self._held: list[tuple[Value, ...]] = []  # scalars that no transaction has written yet
        self._written = -math.inf
        self._parameters: dict[tuple[Value, ...], int] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()
        self.add_meta(started)
        atexit.register(self.flush)

    def add_meta(self, values: Mapping[str, object]) -> None:
        """Write JSON values by key; a later value of the same key replaces the earlier."""
        self._append("meta", [(key, _json(value)) for key, value in values.items()])

    def add_parameters(self, descriptions: Iterable[Mapping[str, object]]) -> list[int]:
        """Make sure that each described parameter has a row; return the row numbers."""
        rows, new = [], []
        for described in descriptions:
            row = tuple(_plain(described[column]) for column in COLUMNS["parameters"])
            if row not in self._parameters:
                self._parameters[row] = len(self._parameters) + 1
                new.append(row)
            rows.append(self._parameters[row])
        self._append("parameters", new)
        return rows

    def add_observation(self, observation: Observation, rows: list[int]) -> int:
        """Write an observation whose names are the parameter rows ``rows``; return its bytes."""
        blob = pack(to_arrays(observation))
        which = np.asarray(rows, "<u4").tobytes()
        o = observation
        scale = o.scale if math.isfinite(o.scale) else None
        values = (o.step, o.time, o.stage, int(o.skipped), scale, o.every, o.seconds, which, blob)
        self._append("observations", [values])
        return len(blob) + len(which)

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by name; nan is kept as NULL, which SQLite has for it.

        A transaction costs as much as a small optimizer step, and loops log at every one of them:
        numbers that come within a second of the last transaction wait for the next, or `flush`.
        """
        now = time.time()
        rows: list[tuple[Value, ...]] = []
        for name, value in values.items():
            number = float(value)
            rows.append((int(step), now, name, None if math.isnan(number) else number))
        self._append("scalars", rows, patience=_PATIENCE)

    def flush(self) -> None:
        """Write the numbers that wait."""
        self._append("scalars", [])

    def add_alarm(self, alarm: Alarm) -> None:
        """Write an alarm."""
        body = _json({part: getattr(alarm, part) for part in ("what", "found", "wanted", "mend")})
        a = alarm
        self._append("alarms", [(a.step, time.time(), a.kind, a.severity, a.name, a.rank, body)])

    def add_artifact(self, step: int, name: str, kind: str, data: bytes) -> None:
        """Write bytes by name: an array, images, a JSON document. See `artifacts`."""
        self._append("artifacts", [(int(step), time.time(), name, kind, data)])

    def close(self) -> None:
        """Write what waits, fold the log into the one file and let go of it.

        Raises:
            RunError: What waits cannot be written; the file is closed all the same.
        """
        atexit.unregister(self.flush)
        try:
            self.flush()
        finally:
            with self._lock:
                self._held = []
                self._database.close()

    def _append(self, table: str, rows: list[tuple[Value, ...]], patience: float = 0.0) -> None:
        """Write ``rows``, and the scalars that wait, in one transaction.

        Scalars wait themselves where the last one is not ``patience`` seconds ago.

        Raises:
            RunError: They cannot be written; the scalars are not tried again.
        """
        if os.getpid() != self._process:  # a forked worker must not touch the file
            return
        with self._lock:
            new = {"scalars": self._held}
            new[table] = new.get(table, []) + rows
            if patience and time.monotonic() - self._written < patience:
                self._held = new["scalars"]
                return
            self._held = []
            if not any(new.values()):
                return
            if _identity(self.path) != self._identity:
                # SQLite would go on writing into the unlinked file without a word.
                raise RunError("the run database has been moved or deleted", where=str(self.path))
            try:
                with self._database:
                    self._count(STEPS, self.steps)
                    totals = {name: self._insert(name, these) for name, these in new.items()}
            except sqlite3.Error as error:
                raise RunError(
                    "the run database cannot be written",
                    where=str(self.path),
                    found=f"{type(error).__name__}: {error}",
                ) from error
            self._rows |= totals
            self._written = time.monotonic()

    def _insert(self, table: str, rows: list[tuple[Value, ...]]) -> int:
        """Put rows and their tally into the open transaction; return how many there are then."""
        first = self._rows[table] + 1
        if not rows:
            return first - 1
        plain = [tuple(map(_storable, row)) for row in rows]
        checked = [(seq, *row, checksum(table, seq, row)) for seq, row in enumerate(plain, first)]
        total = first + len(rows) - 1
        marks = ", ".join("?" * len(checked[0]))
        self._database.executemany(f"INSERT INTO {table} VALUES ({marks})", checked)
        self._count(table, total)
        return total

    def _count(self, name: str, number: int) -> None:
        row = (name, number, checksum("tally", number, (name,)))
        self._database.execute("INSERT OR REPLACE INTO tally VALUES (?, ?, ?)", row)


def newest(folder: "str | os.PathLike[str]") -> Path:
    """The database of ``folder`` that was begun last.

    Raises:
        RunError: There is none.
    """
    folder = Path(folder)
    found = sorted(folder.glob(f"run*{SUFFIX}"), key=_number) if folder.is_dir() else []
    if not found:
        raise RunError(
            "the folder holds no run",
            where=str(folder),
            found="no run.db" if folder.is_dir() else "no such folder",
            wanted="a folder that ln.watch(..., to=folder) wrote to",
            mend="learnables runs",
        )
    return found[-1]


def _number(path: Path) -> int:
    tail = path.stem.removeprefix("run").removeprefix("-")
    return int(tail) if tail.isdigit() else 1


def _claim(folder: Path) -> Path:
    """A new, empty file; O_EXCL lets exactly one of any number of writers have it."""
    number = 1 + max((_number(path) for path in folder.glob(f"run*{SUFFIX}")), default=0)
    while True:
        path = folder / (f"run-{number}{SUFFIX}" if number > 1 else f"run{SUFFIX}")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            number += 1
        else:
            return path


def _create(path: Path) -> sqlite3.Connection:
    # check_same_thread: scalars may come from another thread; our lock serialises the calls.
    database = sqlite3.connect(path, timeout=5.0, check_same_thread=False)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    database.execute("PRAGMA wal_autocheckpoint = 256")  # pages: a log of 1 MB is read quickly
    database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    database.execute(f"PRAGMA user_version = {VERSION}")
    database.executescript(CREATE)
    return database


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return (status.st_dev, status.st_ino)


def _storable(value: Value) -> Value:
    """Text without lone surrogates, which Python allows in a name and UTF-8 does not."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value


def _json(value: object) -> str:
    return json.dumps(value, default=str)


def _plain(value: object) -> Value:
    if isinstance(value, bool):
        return int(value)
    if value is None or isinstance(value, (int, float, str, bytes)):
        return value
    return _json(value)
