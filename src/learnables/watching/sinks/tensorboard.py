"""TensorBoard: histograms as they were counted, without the second look its writer takes."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np

from learnables.arguments import require_path
from learnables.errors import need_extra
from learnables.watching.observation import Observation, Rows
from learnables.watching.sinks.base import Sink
from learnables.watching.sinks.escape import tensorboard_tag
from learnables.watching.sinks.events import EventFile


@final
class TensorBoard(Sink):
    """Write event files: histograms and norms of every parameter, gradient and update.

    torch's ``add_histogram`` takes bfloat16 through float16, where 1e-9 becomes 0 and 1e6 becomes
    inf, drops NaN, and raises where everything is NaN. Here the counted histogram is written raw:
    bins by powers of two, with non-finite values in a scalar of their own.

    Args:
        folder: Where the event files go.

    Raises:
        ArgumentError: ``folder`` is no path.
        MissingExtraError: The package tensorboard is not installed.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: "str | Path") -> None:
        require_path(folder, "folder", wanted="a folder", mend='TensorBoard("runs/events")')
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import HistogramProto
        except ImportError as error:
            raise need_extra("tensorboard", "train", "writing TensorBoard events") from error
        self._events: Any = Event
        self._histograms: Any = HistogramProto
        self._file = EventFile(folder)
        begin = self._events(wall_time=time.time(), file_version="brain.Event:2")
        self._file.write(begin.SerializeToString())

    def observation(self, observation: Observation) -> None:
        """Histograms of weight, gradient and update; norms and the update ratio as scalars.

        The same records as those of ``add_histogram_raw`` and ``add_scalar``, but all in one event.
        """
        event, summary = self._event(observation.step, observation.time)
        tags = [tensorboard_tag(name) for name in observation.names]
        for quantity, rows in observation.rows.items():
            filled = rows.filled.by_row() if rows.filled is not None else None
            norms, bad = rows.norm.tolist(), rows.moments["nonfinite"].tolist()
            for i in np.flatnonzero(rows.present).tolist():
                summary.value.add(tag=f"{quantity}_norm/{tags[i]}", simple_value=norms[i])
                if bad[i]:
                    summary.value.add(tag=f"{quantity}_nonfinite/{tags[i]}", simple_value=bad[i])
                histogram = self._histogram(filled[i], rows, i) if filled is not None else None
                if histogram is not None:
                    summary.value.add(tag=f"{quantity}/{tags[i]}", histo=histogram)
        for i in np.flatnonzero(np.isfinite(observation.ratio)).tolist():
            ratio = float(observation.ratio[i])
            summary.value.add(tag=f"update_ratio/{tags[i]}", simple_value=ratio)
        self._file.write(event.SerializeToString())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars under their names."""
        event, summary = self._event(step, time.time())
        for name, value in values.items():
            summary.value.add(tag=tensorboard_tag(name), simple_value=float(value))
        self._file.write(event.SerializeToString())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _event(self, step: int, when: float) -> tuple[Any, Any]:
        event = self._events(wall_time=when, step=int(step))
        return event, event.summary

    def _histogram(self, filled: Mapping[int, int], rows: Rows, i: int) -> Any:
        limits, counts = buckets(filled, rows, i)
        if not counts:
            return None
        return self._histograms(
            min=float(rows.moments["min"][i]),
            max=float(rows.moments["max"][i]),
            num=sum(counts),
            sum=float(rows.moments["sum"][i]),
            sum_squares=float(rows.moments["sum_of_squares"][i]),
            bucket_limit=limits,
            bucket=counts,
        )


def buckets(filled: Mapping[int, int], rows: Rows, i: int) -> tuple[list[float], list[int]]:
    """Right edges and counts of the finite values, ascending; empty where there are none.

    Between two filled bins that do not touch, an empty bucket keeps the left edge in place.

    Args:
        filled: Bin → count of row ``i``, as `Filled.by_row` gives it.
        rows: Where its extrema are.
        i: The row.
    """
    zeros, bad = int(rows.moments["zeros"][i]), int(rows.moments["nonfinite"][i])
    if int(rows.moments["count"][i]) == bad:
        return [], []
    # Zeros of both signs lie in bins 0 and 256, with what is below 2^-126; keep them in one
    # bucket around 0. The non-finite ones lie in 255 and 511.
    tiny = filled.get(0, 0) + filled.get(256, 0)
    negative = [(-_EDGES[b - 255], -_EDGES[b - 256], n) for b, n in filled.items() if 256 < b < 511]
    pieces = negative[::-1]
    if tiny or zeros:
        pieces.append((-_EDGES[1], _EDGES[1], tiny))
    pieces += [(_EDGES[b], _EDGES[b + 1], n) for b, n in filled.items() if 0 < b < 255]
    huge = filled.get(255, 0) + filled.get(511, 0) - bad  # float64 beyond 2^128
    if huge > 0:
        low, high = float(rows.moments["min"][i]), float(rows.moments["max"][i])
        pieces.append((_EDGES[255] if low > 0 else low, high, huge))
        pieces.sort()
    limits: list[float] = []
    counts: list[int] = []
    end = -math.inf
    for left, right, number in pieces:
        if end < left:
            limits.append(left)
            counts.append(0)
        limits.append(right)
        counts.append(number)
        end = right
    return limits, counts


_EDGES = [math.ldexp(1.0, k - 127) for k in range(256)]  # of the magnitudes in bin k, the lower one
