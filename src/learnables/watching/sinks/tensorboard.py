"""TensorBoard: histograms as they were counted, without the second look its writer takes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import final

import numpy as np

from learnables.errors import need_extra
from learnables.watching.encoding import Array
from learnables.watching.observation import Observation, Rows
from learnables.watching.sinks.base import Sink
from learnables.watching.sinks.escape import tensorboard_tag


@final
class TensorBoard(Sink):
    """Write event files: histograms and norms of every parameter, gradient and update.

    torch's ``add_histogram`` takes bfloat16 through float16, where 1e-9 becomes 0 and 1e6 becomes
    inf, drops NaN, and raises where everything is NaN. Here the counted histogram is written raw:
    bins by powers of two, with non-finite values in a scalar of their own.

    Args:
        folder: Where the event files go.

    Raises:
        MissingExtraError: The package tensorboard is not installed.
    """

    def __init__(self, folder: "str | Path") -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise need_extra("tensorboard", "train", "writing TensorBoard events") from error
        self._writer = SummaryWriter(str(folder))

    def observation(self, observation: Observation) -> None:
        """Histograms of weight, gradient and update; norms and the update ratio as scalars."""
        step, when = observation.step, observation.time
        for quantity, rows in observation.rows.items():
            histogram = rows.histogram
            for i in np.flatnonzero(rows.present):
                tag = tensorboard_tag(observation.names[i])
                self._scalar(f"{quantity}_norm/{tag}", float(rows.norm[i]), step, when)
                bad = int(rows.moments["nonfinite"][i])
                if bad:
                    self._scalar(f"{quantity}_nonfinite/{tag}", bad, step, when)
                if histogram is not None:
                    limits, counts = buckets(histogram[i], rows, int(i))
                    self._histogram(f"{quantity}/{tag}", rows, int(i), limits, counts, step, when)
        for i in np.flatnonzero(np.isfinite(observation.ratio)):
            tag = tensorboard_tag(observation.names[i])
            self._scalar(f"update_ratio/{tag}", float(observation.ratio[i]), step, when)
        self._writer.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars under their names."""
        for name, value in values.items():
            self._scalar(tensorboard_tag(name), value, step, None)

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()

    def _scalar(self, tag: str, value: float, step: int, when: float | None) -> None:
        self._writer.add_scalar(tag, value, step, walltime=when)

    def _histogram(
        self,
        tag: str,
        rows: Rows,
        i: int,
        limits: list[float],
        counts: list[int],
        step: int,
        when: float,
    ) -> None:
        if not counts:
            return
        self._writer.add_histogram_raw(
            tag,
            min=float(rows.moments["min"][i]),
            max=float(rows.moments["max"][i]),
            num=int(sum(counts)),
            sum=float(rows.moments["sum"][i]),
            sum_squares=float(rows.moments["sum_of_squares"][i]),
            bucket_limits=limits,
            bucket_counts=counts,
            global_step=step,
            walltime=when,
        )


def buckets(histogram: Array, rows: Rows, i: int) -> tuple[list[float], list[int]]:
    """Right edges and counts of the finite values, ascending; empty where there are none.

    Between two filled bins that do not touch, an empty bucket keeps the left edge in place.
    """
    counted = histogram.astype(np.int64).copy()
    zeros, bad = int(rows.moments["zeros"][i]), int(rows.moments["nonfinite"][i])
    low, high = float(rows.moments["min"][i]), float(rows.moments["max"][i])
    if int(rows.moments["count"][i]) == bad:
        return [], []
    # Zeros of both signs lie in bins 0 and 256, with what is below 2^-126; keep them in one
    # bucket around 0. The non-finite ones lie in 255 and 511.
    tiny = int(counted[0] + counted[256])
    pieces: list[tuple[float, float, int]] = []
    for k in range(255, 0, -1):
        if k < 255 and counted[256 + k]:
            pieces.append((-math.ldexp(1.0, k - 126), -math.ldexp(1.0, k - 127), counted[256 + k]))
    if tiny or zeros:
        pieces.append((-math.ldexp(1.0, -126), math.ldexp(1.0, -126), tiny))
    for k in range(1, 255):
        if counted[k]:
            pieces.append((math.ldexp(1.0, k - 127), math.ldexp(1.0, k - 126), counted[k]))
    huge = int(counted[255] + counted[511]) - bad  # float64 beyond 2^128
    if huge > 0:
        pieces.append((math.ldexp(1.0, 128) if low > 0 else low, high, huge))
        pieces.sort()
    limits: list[float] = []
    counts: list[int] = []
    for left, right, number in pieces:
        if not limits or limits[-1] < left:
            limits.append(left)
            counts.append(0)
        limits.append(right)
        counts.append(int(number))
    return limits, counts
