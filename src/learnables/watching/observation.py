"""What was seen at one optimizer step: plain data, made by the recorder, read by all others."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import numpy as np

from learnables.watching.encoding import Array

QUANTITIES = ("weight", "gradient", "update")
MOMENTS = ("count", "sum", "sum_of_squares", "absmax", "min", "max", "zeros", "nonfinite")
OVERFLOWS = "overflows"  # the document of those that no observation holds any more
CONSUMED = "gradient norm, after clipping"  # what it is called: a clipped one is flat
BINS = 512  # sign × biased exponent of float32: bin 256·(x < 0) + exponent


@dataclass(frozen=True, eq=False)
class Filled:
    """The bins of histograms that are not empty, row after row: a hundredth of all.

    Attributes:
        lengths: How many of them each row has, shape (P,).
        bins: Which, shape (n,).
        counts: What is in them, shape (n,).
    """

    lengths: Array
    bins: Array
    counts: Array

    @property
    def rows(self) -> Array:
        """The row of each bin, shape (n,)."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def by_row(self) -> list[dict[int, int]]:
        """Bin → count of each row; the bins ascend."""
        bins, counts, found, at = self.bins.tolist(), self.counts.tolist(), [], 0
        for length in self.lengths.tolist():
            found.append(dict(zip(bins[at : at + length], counts[at : at + length], strict=True)))
            at += length
        return found

    @classmethod
    def of(cls, histogram: Array) -> "Filled":
        """Those of a histogram of shape (P, 512)."""
        row, bins = np.nonzero(histogram)
        lengths = np.bincount(row, minlength=len(histogram))
        return cls(lengths.astype(np.uint16), bins.astype(np.uint16), histogram[row, bins])


@dataclass(frozen=True, eq=False)
class Rows:
    """Statistics of one quantity, one row per parameter; ``count`` 0 where there was none.

    Attributes:
        moments: The fields of `learnables.statistics` but the histogram, each of shape (P,); those
            of the finite values, with NaN and ±inf only counted.
        filled: Counts by sign and exponent; None where not taken.
    """

    moments: Mapping[str, Array]
    filled: Filled | None = None

    def __getattr__(self, name: str) -> Array:
        try:
            return self.__dict__["moments"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def histogram(self) -> Array | None:
        """Counts by sign and exponent, shape (P, 512); built at each call."""
        if self.filled is None:
            return None
        whole = np.zeros((len(self.filled.lengths), BINS), np.int64)
        whole[self.filled.rows, self.filled.bins] = self.filled.counts
        return whole

    @cached_property
    def present(self) -> Array:
        """Which rows hold anything, shape (P,)."""
        return np.asarray(self.moments["count"] > 0)

    @cached_property
    def norm(self) -> Array:
        """Euclidean norm of each row, shape (P,); nan where there is none, or not all is finite."""
        whole = self.present & (self.moments["nonfinite"] == 0)
        return np.where(whole, np.sqrt(self.moments["sum_of_squares"]), np.nan)


@dataclass(frozen=True, eq=False)
class Observation:
    """One look at a training step.

    Attributes:
        step: Number of the optimizer step, counted from 1.
        time: Seconds since the epoch.
        names: Qualified names, one per row.
        stage: Where the gradient was read: ``"step"`` in the optimizer's pre-hook, after
            accumulation, reduction, unscaling and clipping; ``"step, divided by the scale"`` where
            a fused optimizer unscales by itself; ``"closure"`` at the end of the closure.
        skipped: The scaler found an overflow: nothing was updated.
        scale: The loss scale that the fused optimizer divides by; 1 otherwise.
        every: Interval to the next observation, in steps.
        seconds: What the previous observation cost.
        rows: Quantity (``weight``, ``gradient``, ``update``) → statistics. The weight is the one
            before the step, with which the gradient was computed; the update is what changed.
        columns: Further numbers, one per parameter, nan where they do not apply: ``lr``; ``lost``,
            the share of elements with a gradient that did not change; ``defect``, the distance
            from the declared set; ``digits``, those of the mantissa where the value is
            stored in half precision.
        norms: Euclidean norm of the whole gradient at each step after the previous observation
            up to this one; nan where there was no time to look at it.
        skips: Steps skipped since the previous observation, this one included.
        overflows: Skipped step → rows of the parameters whose gradients were not finite; of the
            first 64 of them.
    """

    step: int
    time: float
    names: tuple[str, ...]
    stage: str = "step"
    skipped: bool = False
    scale: float = 1.0
    every: int = 1
    seconds: float = 0.0
    rows: Mapping[str, Rows] = field(default_factory=dict)
    columns: Mapping[str, Array] = field(default_factory=dict)
    norms: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    skips: int = 0
    overflows: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def ratio(self) -> Array:
        """‖update‖ / ‖weight‖ of each parameter, shape (P,); nan where there is no update."""
        if "update" not in self.rows or "weight" not in self.rows or self.skipped:
            return np.full(len(self.names), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.rows["update"].norm / self.rows["weight"].norm)


def to_arrays(observation: Observation) -> dict[str, Array]:
    """The numbers of an observation as named arrays, histograms as (row length, bin, count)."""
    arrays: dict[str, Array] = {}
    for quantity, rows in observation.rows.items():
        for name in MOMENTS:
            if name != "absmax":  # the larger of max and -min
                arrays[f"{quantity}.{name}"] = _small(rows.moments[name])
        if rows.filled is not None:
            arrays[f"{quantity}.filled"] = rows.filled.lengths
            arrays[f"{quantity}.bins"] = rows.filled.bins
            arrays[f"{quantity}.counts"] = _small(rows.filled.counts)
    for name, column in observation.columns.items():
        arrays[f"column.{name}"] = column.astype(np.float32)
    arrays["norms"] = observation.norms.astype(np.float32)
    arrays["skips"] = np.array(observation.skips, np.uint32)
    if observation.overflows:
        blamed = list(observation.overflows.values())
        arrays["overflows.steps"] = np.array(list(observation.overflows), np.uint32)
        arrays["overflows.lengths"] = np.array([len(rows) for rows in blamed], np.uint32)
        arrays["overflows.rows"] = np.array([i for rows in blamed for i in rows], np.uint32)
    return arrays


def from_arrays(arrays: Mapping[str, Array]) -> tuple[dict[str, Rows], dict[str, Array], Array]:
    """``rows``, ``columns`` and ``norms`` of the `Observation` that `to_arrays` was given."""
    rows = {}
    for quantity in QUANTITIES:
        if f"{quantity}.count" not in arrays:
            continue
        moments = {name: arrays[f"{quantity}.{name}"] for name in MOMENTS if name != "absmax"}
        moments["absmax"] = np.maximum(np.abs(moments["max"]), np.abs(moments["min"]))
        moments["absmax"][~np.isfinite(moments["absmax"])] = 0.0  # of no finite value
        filled = None
        if f"{quantity}.filled" in arrays:
            filled = Filled(*(arrays[f"{quantity}.{key}"] for key in ("filled", "bins", "counts")))
        rows[quantity] = Rows(moments, filled)
    columns = {
        key.removeprefix("column."): value
        for key, value in arrays.items()
        if key.startswith("column.")
    }
    return rows, columns, arrays["norms"]


def _small(values: Array) -> Array:
    """Counts in the fewest bytes that hold them all; other numbers unchanged."""
    if values.dtype.kind not in "iu":
        return values
    largest = int(values.max(initial=0))
    return values.astype(np.min_scalar_type(largest))


def overflows_in(arrays: Mapping[str, Array]) -> dict[int, tuple[int, ...]]:
    """``overflows`` of the `Observation` that `to_arrays` was given."""
    if "overflows.steps" not in arrays:
        return {}
    steps, lengths, rows = (arrays[f"overflows.{x}"].tolist() for x in ("steps", "lengths", "rows"))
    ahead = iter(rows)
    return {step: tuple(islice(ahead, n)) for step, n in zip(steps, lengths, strict=True)}
