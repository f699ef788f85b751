"""JSON lines: one object a line, for grep, jq and pandas."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, final

import numpy as np

from learnables.arguments import require_path
from learnables.watching.alarm import Alarm
from learnables.watching.observation import MOMENTS, Observation
from learnables.watching.sinks.base import Sink


@final
class JSONLines(Sink):
    """Append to a file of JSON lines; each line is flushed.

    Lines of an observation: ``{"type": "observation", "step", "time", "name", "quantity", "norm",
    "min", ..., "histogram": {"bin": count}}``, one for each parameter and quantity. Numbers that
    JSON lacks (nan, inf) are null. Control characters in names are JSON's escapes.

    Args:
        file: A path, or an open text file, which is left open.

    Raises:
        ArgumentError: ``file`` is neither.
        OSError: It cannot be written.
    """

    def __init__(self, file: "str | Path | IO[str]") -> None:
        self._mine = not hasattr(file, "write")
        if self._mine:
            wanted = "the file to append to, or an open one"
            require_path(file, "file", wanted=wanted, mend='JSONLines("run.jsonl")')
        self._file: IO[str] = (
            Path(file).open("a", encoding="ascii")  # noqa: SIM115 - close() does
            if isinstance(file, (str, os.PathLike))
            else file
        )

    def observation(self, observation: Observation) -> None:
        """One line for each parameter and quantity."""
        o = observation
        head = {"type": "observation", "step": o.step, "time": o.time, "stage": o.stage}
        for quantity, rows in o.rows.items():
            histogram = rows.histogram
            for i in np.flatnonzero(rows.present):
                line: dict[str, Any] = {**head, "skipped": o.skipped, "name": o.names[i]}
                line["quantity"] = quantity
                line["norm"] = float(rows.norm[i])
                line |= {name: rows.moments[name][i].item() for name in MOMENTS}
                if quantity == "update":
                    line["ratio"] = float(o.ratio[i])
                if histogram is not None:
                    filled = np.flatnonzero(histogram[i])
                    line["histogram"] = {str(k): int(histogram[i, k]) for k in filled}
                self._write(line)
        for name, column in o.columns.items():
            for i in np.flatnonzero(~np.isnan(column)):
                self._write(
                    {**head, "name": o.names[i], "quantity": name, "value": column[i].item()}
                )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line for each number."""
        for name, value in values.items():
            self._write({"type": "scalar", "step": step, "name": name, "value": float(value)})

    def alarm(self, alarm: Alarm) -> None:
        """One line."""
        self._write({"type": "alarm", **vars(alarm)})

    def close(self) -> None:
        """Close the file, where this opened it."""
        if self._mine:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        plain = {
            key: None if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in line.items()
        }
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()
