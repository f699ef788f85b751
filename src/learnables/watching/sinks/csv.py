"""One table for spreadsheets: a line for each parameter, quantity and step."""

from collections.abc import Mapping
from pathlib import Path
from typing import final

import numpy as np

from learnables.arguments import require_path
from learnables.watching.observation import MOMENTS, Observation
from learnables.watching.sinks.base import Sink
from learnables.watching.sinks.escape import csv

_COLUMNS = ("step", "name", "quantity", "norm", *MOMENTS)


@final
class CSV(Sink):
    """Append to a CSV file; names can be no formulas in it. Scalars have their value in ``norm``.

    Args:
        file: The path.

    Raises:
        ArgumentError: ``file`` is no path.
        OSError: It cannot be written.
    """

    def __init__(self, file: "str | Path") -> None:
        require_path(file, "file", wanted="the file to append to", mend='CSV("run.csv")')
        self._file = Path(file).open("a", encoding="utf-8", newline="")  # noqa: SIM115 - close()
        if self._file.tell() == 0:
            self._file.write(",".join(_COLUMNS) + "\r\n")

    def observation(self, observation: Observation) -> None:
        """One line for each parameter and quantity."""
        for quantity, rows in observation.rows.items():
            for i in np.flatnonzero(rows.present):
                numbers = [rows.norm[i], *(rows.moments[name][i] for name in MOMENTS)]
                head = [str(observation.step), csv(observation.names[i]), quantity]
                self._file.write(",".join([*head, *(f"{x:.9g}" for x in numbers)]) + "\r\n")
        self._file.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line for each number."""
        for name, value in values.items():
            rest = "," * len(MOMENTS)
            self._file.write(f"{step},{csv(name)},scalar,{value:.9g}{rest}\r\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
