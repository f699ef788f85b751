"""Read a run database: checked row by row, while it is being written or long after."""

import json
import math
import os
import sqlite3
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np

from learnables.arguments import describe, require_path
from learnables.errors import RunError
from learnables.watching.alarm import Alarm
from learnables.watching.encoding import Array, unpack
from learnables.watching.notebook import table
from learnables.watching.observation import (
    MOMENTS,
    OVERFLOWS,
    QUANTITIES,
    Observation,
    from_arrays,
    overflows_in,
)
from learnables.watching.schema import APPLICATION_ID, COLUMNS, STEPS, VERSION, checksum
from learnables.watching.store import newest
from learnables.watching.wal import faults

_Row: TypeAlias = "tuple[Any, ...]"  # whatever a file of unknown origin holds
_FOREVER = float("inf")


@dataclass(frozen=True, eq=False)
class Series:
    """Numbers over steps.

    Attributes:
        steps: Shape (n,), ascending.
        values: Shape (n,).
    """

    steps: Array
    values: Array


@dataclass(frozen=True)
class Described:
    """A parameter as it was when the run began to watch it."""

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    device: str
    numel: int
    trainable: bool
    policy: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Artifact:
    """Bytes that were stored by name: arrays, images, a document."""

    step: int
    time: float
    name: str
    kind: str
    data: bytes = field(repr=False)

    def arrays(self) -> dict[str, Array]:
        """The arrays of a table or of images."""
        return unpack(self.data)

    def document(self) -> Any:
        """The JSON value of a document.

        Raises:
            RunError: It is none.
        """
        try:
            return json.loads(self.data)
        except ValueError as error:
            raise RunError("an artifact is no JSON", where=self.name, found=str(error)) from error


@final
class Run:
    """One run, read from its folder or from one database file.

    A run that was resumed lies in several files; they are read as one, and where two hold the same
    step the newer file counts. Rows that fail their checksum are left out and listed in ``damage``:
    a number that is shown is the number that was written.

    Args:
        path: A folder that `learnables.watch` wrote to (its newest run is taken), or a file.

    Raises:
        ArgumentError: ``path`` is no path.
        RunError: There is no run, it has a newer schema than this version reads, or the file
            cannot be read at all.

    Attributes:
        path: The newest file.
        meta: What the writer said about the run.
        damage: One sentence for each row or file that cannot be trusted; empty for a sound run.
    """

    def __init__(self, path: "str | os.PathLike[str]") -> None:
        wanted = "the folder that ln.watch(..., to=folder) wrote to, or a file in it"
        require_path(path, "path", wanted=wanted, mend='Run("runs/run")')
        path = Path(path)
        self.path = newest(path) if path.is_dir() else path
        self.damage: list[str] = []
        self.meta: dict[str, Any] = {}
        self._tables: dict[str, list[tuple[int, _Row]]] = {t: [] for t in COLUMNS}
        self._described: list[dict[int, Described]] = []
        self._told = 0  # steps, by the newest file that says how many
        seen: set[Path] = set()
        file, before = self.path, _FOREVER
        while file not in seen:
            seen.add(file)
            tables, tally = _read(file, self.damage)
            self._told = self._told or tally.get(STEPS, 0)
            meta = _meta(tables, file, self.damage)
            self.meta = {**meta, **self.meta}
            self._described.append(_parameters(tables, self.damage))
            which, first = len(self._described) - 1, before
            # What is said of the checkpoint itself, such as an audit, replaces no number of it.
            begins_after = meta.get("begins_after")
            if isinstance(begins_after, int):
                first = min(first, begins_after + 1)
            for name in ("observations", "scalars", "alarms", "artifacts"):
                rows = [row for row in tables[name] if _step(row) < before]
                if not isinstance(begins_after, int):
                    first = min([first, *map(_step, rows)])
                self._tables[name] = [(which, row) for row in rows] + self._tables[name]
            before = first
            if "continues" not in meta:
                break
            file = self.path.parent / Path(str(meta["continues"])).name
            if not file.exists():
                self.damage.append(f"{file.name}, which this run continues, is not there")
                break

    @property
    def name(self) -> str:
        """The run's folder, and the file where it is not the first."""
        folder = self.path.absolute().parent.name
        return folder if self.path.stem == "run" else f"{folder}/{self.path.stem}"

    @property
    def steps(self) -> int:
        """Optimizer steps that it has done, as of what it wrote last, be it a look or a number."""
        return max([self._told, *(o.step for o in self.observations)])

    @property
    def seconds(self) -> float:
        """From when it started to what it wrote last, of whatever kind."""
        rows = (row for kept in self._tables.values() for _, row in kept)
        times = [row[2] for row in rows]  # each begins with its number, the step and the time
        started = float(self.meta.get("started", 0.0))
        return max((float(t) for t in times if isinstance(t, float)), default=started) - started

    def _repr_html_(self) -> str:
        """What is wrong, and one row per parameter, for notebooks."""
        return table(self)

    @cached_property
    def parameters(self) -> tuple[Described, ...]:
        """Every parameter that was watched, in the order of the model's walk."""
        found: dict[str, Described] = {}
        for described in self._described:
            for parameter in described.values():
                found.setdefault(parameter.name, parameter)
        return tuple(found.values())

    @cached_property
    def observations(self) -> tuple[Observation, ...]:
        """Every observation, by step; of two at the same step the later one."""
        found: dict[int, Observation] = {}
        for which, row in self._tables["observations"]:
            try:
                one = _observation(row, self._described[which])
            except (RunError, KeyError, ValueError, TypeError) as error:
                self.damage.append(f"observations: row {row[0]}: {error}")
                continue
            found[one.step] = one
        return tuple(found[step] for step in sorted(found))

    @cached_property
    def scalars(self) -> dict[str, Series]:
        """Name → numbers over steps; of two at the same step the later one."""
        found: dict[str, dict[int, float]] = {}
        for _, (_seq, step, _time, name, value) in self._tables["scalars"]:
            number = math.nan if value is None else float(value)
            found.setdefault(str(name), {})[int(step)] = number
        return {
            name: Series(np.array(sorted(by_step)), np.array([by_step[s] for s in sorted(by_step)]))
            for name, by_step in found.items()
        }

    @cached_property
    def alarms(self) -> tuple[Alarm, ...]:
        """Every alarm, as it was raised."""
        return tuple(self._alarms())

    def _alarms(self) -> Iterator[Alarm]:
        for _, (seq, step, _time, kind, severity, name, rank, body) in self._tables["alarms"]:
            try:
                parts = json.loads(str(body))
                yield Alarm(
                    step=int(step),
                    kind=str(kind),
                    severity=str(severity),
                    name=str(name),
                    rank=None if rank is None else int(rank),
                    **{part: str(parts.get(part, "")) for part in ("what", "found", "wanted")},
                    mend=str(parts.get("mend", "")),
                )
            except (ValueError, TypeError, AttributeError) as error:
                self.damage.append(f"alarms: row {seq}: {error}")

    @cached_property
    def artifacts(self) -> tuple[Artifact, ...]:
        """Everything stored by name, oldest first."""
        return tuple(
            Artifact(int(step), float(time), str(name), str(kind), data)
            for _, (_seq, step, time, name, kind, data) in self._tables["artifacts"]
        )

    def artifact(self, name: str) -> Artifact | None:
        """The latest artifact of this name."""
        return next((a for a in reversed(self.artifacts) if a.name == name), None)

    @cached_property
    def gradient_norm(self) -> Series:
        """Norm of the whole consumed gradient, at every step where it was looked at."""
        found: dict[int, float] = {}
        for o in self.observations:
            first = o.step - len(o.norms) + 1
            found.update({first + i: float(x) for i, x in enumerate(o.norms) if not np.isnan(x)})
        steps = sorted(found)
        return Series(np.array(steps, np.int64), np.array([found[s] for s in steps], np.float64))

    @cached_property
    def overflows(self) -> dict[int, tuple[str, ...]]:
        """Step that a gradient scaler skipped → parameters whose gradients were not finite."""
        found = {
            step: tuple(o.names[row] for row in rows)
            for o in self.observations
            for step, rows in o.overflows.items()
        }
        for one in self.artifacts:
            if one.name == OVERFLOWS:
                found.update((int(step), tuple(names)) for step, names in one.document().items())
        return found

    def series(self, quantity: str, statistic: str, name: str) -> Series:
        """One statistic of one parameter over the observations that have it.

        Args:
            quantity: ``"weight"``, ``"gradient"`` or ``"update"``.
            statistic: A field of `learnables.statistics`, or ``"norm"``.
            name: Qualified name of the parameter.

        Raises:
            RunError: The run never saw this parameter, or there is no such quantity or statistic.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> from tempfile import mkdtemp
            >>> with ln.watch(model, optimizer, every=1, to=mkdtemp()) as watcher:
            ...     model(torch.ones(1, 2)).sum().backward()
            ...     optimizer.step()
            >>> Run(watcher.path).series("gradient", "max", "weight").values
            array([1.])
        """
        names = {p.name: p for p in self.parameters}
        _require_one_of(quantity, "quantity", QUANTITIES)
        _require_one_of(statistic, "statistic", ("norm", *MOMENTS))
        if name not in names:
            raise RunError(
                "the run holds no parameter of this name",
                where=str(name),
                found=f"{len(names)} parameters: {', '.join(list(names)[:5])}, …",
                wanted="the name of one of them",
                mend="[p.name for p in run.parameters]",
            )
        steps, values = [], []
        for o in self.observations:
            rows = o.rows.get(quantity)
            if rows is None or name not in o.names:
                continue
            i = o.names.index(name)
            if rows.present[i]:
                steps.append(o.step)
                values.append(float(getattr(rows, statistic)[i]))
        return Series(np.array(steps, np.int64), np.array(values))


def _require_one_of(value: object, name: str, known: Sequence[str]) -> None:
    if value not in known:
        raise RunError(
            f"there is no such {name}",
            where=name,
            found=describe(value),
            wanted=f"one of {', '.join(known)}",
            mend=f"{name}={known[0]!r}",
        )


def _read(path: Path, damage: list[str]) -> tuple[dict[str, list[_Row]], dict[str, int]]:
    """The rows of every table that pass their checksum, without it; and what is counted.

    Raises:
        RunError: The file is no run database, of a newer schema, or unreadable.
    """
    if not path.is_file():
        raise RunError(
            "there is no run database",
            where=str(path),
            found="no such file",
            wanted="a folder that ln.watch(..., to=folder) wrote to, or a file in it",
            mend="learnables runs",
        )
    try:
        with closing(_connect(path)) as database:
            database.execute("BEGIN")  # one snapshot for all tables
            _check_version(database, path)
            tally = _tally(database, path, damage)
            rows = {t: _rows(database, t, tally.get(t), path, damage) for t in COLUMNS}
    except sqlite3.Error as error:
        raise RunError(
            "the run database is damaged", where=str(path), found=f"SQLite says: {error}"
        ) from error
    damage += faults(path.with_name(path.name + "-wal"))
    return rows, tally


def _connect(path: Path) -> sqlite3.Connection:
    # Without a log beside it nobody writes the file, for a database is never opened again; as
    # immutable it is read without locks and log, so also from a folder that cannot be written.
    closed = not path.with_name(path.name + "-wal").exists()
    how = "mode=ro&immutable=1" if closed else "mode=ro"
    database = sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, timeout=5.0)
    database.execute("PRAGMA trusted_schema = OFF")
    # A flipped bit may leave no UTF-8: then it is the row's checksum that has to say so.
    database.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    return database


def _check_version(database: sqlite3.Connection, path: Path) -> None:
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise RunError(
            "the file is no run database",
            where=str(path),
            found=f"application id {application:#x}",
            wanted=f"{APPLICATION_ID:#x}",
        )
    if version != VERSION:
        raise RunError(
            "the run database has a schema that this version does not read",
            where=str(path),
            found=f"schema {version}",
            wanted=f"schema {VERSION}",
            mend="pip install --upgrade learnables",
        )


def _tally(database: sqlite3.Connection, path: Path, damage: list[str]) -> dict[str, int]:
    found = {}
    for name, rows, crc in database.execute("SELECT name, rows, crc FROM tally"):
        if not isinstance(rows, int) or checksum("tally", rows, (name,)) != crc:
            damage.append(f"{path.name}: the tally of {name!r} fails its checksum")
        else:
            found[name] = rows
    return found


def _rows(
    database: sqlite3.Connection, table: str, total: int | None, path: Path, damage: list[str]
) -> list[_Row]:
    columns = ", ".join(("seq", *COLUMNS[table], "crc"))
    good, next_seq = [], 1
    query = f"SELECT {columns} FROM {table} ORDER BY seq"
    for seq, *values, crc in database.execute(query):
        if checksum(table, seq, tuple(values)) != crc:
            damage.append(f"{path.name}, {table}: row {seq} fails its checksum")
        elif seq != next_seq:
            damage.append(f"{path.name}, {table}: rows {next_seq} to {seq - 1} are missing")
            good.append((seq, *values))
        else:
            good.append((seq, *values))
        next_seq = seq + 1 if isinstance(seq, int) else next_seq
    if next_seq - 1 != (total or 0):
        damage.append(f"{path.name}, {table}: {next_seq - 1} rows, of {total or 0} written")
    return good


def _meta(tables: dict[str, list[_Row]], path: Path, damage: list[str]) -> dict[str, Any]:
    found = {}
    for seq, key, value in tables["meta"]:
        try:
            found[str(key)] = json.loads(str(value))
        except ValueError as error:
            damage.append(f"{path.name}, meta: row {seq}: {error}")
    return found


def _parameters(tables: dict[str, list[_Row]], damage: list[str]) -> dict[int, Described]:
    found = {}
    for row in tables["parameters"]:
        seq, name, names, shape, dtype, device, numel, trainable, policy = row
        try:
            found[int(seq)] = Described(
                name=str(name),
                names=tuple(json.loads(str(names))),
                shape=tuple(json.loads(str(shape))),
                dtype=str(dtype),
                device=str(device),
                numel=int(numel),
                trainable=bool(trainable),
                policy=json.loads(str(policy)),
            )
        except (ValueError, TypeError) as error:
            damage.append(f"parameters: row {seq}: {error}")
    return found


def _observation(row: _Row, described: dict[int, Described]) -> Observation:
    _seq, step, time, stage, skipped, scale, every, seconds, which, numbers = row
    raw = bytes(which)
    ids = struct.unpack(f"<{len(raw) // 4}I", raw)
    arrays = unpack(bytes(numbers))
    rows, columns, norms = from_arrays(arrays)
    return Observation(
        step=int(step),
        time=float(time),
        names=tuple(described[i].name for i in ids),
        stage=str(stage),
        skipped=bool(skipped),
        scale=math.inf if scale is None else float(scale),
        every=int(every),
        seconds=float(seconds),
        rows=rows,
        columns=columns,
        norms=norms,
        skips=int(arrays["skips"]),
        overflows=overflows_in(arrays),
    )


def _step(row: _Row) -> int:
    return int(row[1])
