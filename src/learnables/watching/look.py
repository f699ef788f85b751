"""One look at a step: read before it, complete after it, pack, and read on the host."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from learnables._torch import is_dtensor, own_share
from learnables.entries import Entry
from learnables.stats import Statistics, statistics
from learnables.watching.encoding import Array
from learnables.watching.gradient import Consumption, consumed, consumption, learning_rates
from learnables.watching.observation import BINS, MOMENTS, Filled, Rows
from learnables.watching.sentinel import Sentinel, overflows

_NONE = torch.zeros((), dtype=torch.int64)
_HALF = {torch.float16: 10.0, torch.bfloat16: 7.0}  # binary digits of the mantissa


@dataclass(frozen=True)
class Wanted:
    """What a look is to bring home.

    Attributes:
        quantities: Some of ``weight``, ``gradient``, ``update``.
        histogram: Whether with histograms.
        shared: Whether ranks hold shards, so that each counts its own share only.
    """

    quantities: tuple[str, ...]
    histogram: bool
    shared: bool = False

    def share(self, x: Tensor) -> Tensor:
        """The values of ``x`` that this rank counts."""
        return own_share(x.detach()) if self.shared else x.detach()


@dataclass
class Part:
    """What one optimizer contributes to a look; ``entries`` are those it holds.

    ``blocks`` are statistics of one quantity, with the index of the entry for each row; ``still``
    counts the elements with a gradient that did not change; ``defects`` are distances from sets.
    """

    entries: list[Entry]
    how: Consumption
    rates: list[float]
    stage: str = "step"
    skipped: bool = False
    blocks: list[tuple[str, list[int], Statistics]] = field(default_factory=list)
    snapshot: list[Tensor] = field(default_factory=list)
    still: dict[int, Tensor] = field(default_factory=dict)
    defects: dict[int, Tensor] = field(default_factory=dict)


def begin(optimizer: Optimizer, entries: Sequence[Entry], wanted: Wanted) -> Part:
    """Read weights and gradients, and keep the weights; to be called before the step."""
    rates = learning_rates(optimizer)
    held = [entry for entry in entries if entry.param in rates]
    how = consumption(optimizer)
    part = Part(held, how, [rates[entry.param] for entry in held], how.stage)
    read(part, wanted)
    if "update" in wanted.quantities:
        part.snapshot = [wanted.share(entry.param).clone() for entry in held]
    return part


def leftover(entries: Sequence[Entry], wanted: Wanted) -> Part:
    """Read weights and gradients of parameters that no optimizer holds."""
    part = Part(list(entries), Consumption(None, None, ""), [math.nan] * len(entries), "")
    read(part, wanted)
    return part


def read(part: Part, wanted: Wanted, weights: bool = True) -> None:
    """Read weights and gradients into ``part``, or only gradients, in place of those it has."""
    indices: list[int] = []
    tensors: list[Tensor] = []
    if weights and "weight" in wanted.quantities:
        indices += [entry.index for entry in part.entries]
        tensors += [wanted.share(entry.param) for entry in part.entries]
    first = len(tensors)
    if "gradient" in wanted.quantities:
        there = [(e.index, e.param.grad) for e in part.entries if e.param.grad is not None]
        indices += [index for index, _ in there]
        tensors += consumed([wanted.share(gradient) for _, gradient in there], part.how)
    seen = statistics(tensors, histogram=wanted.histogram)
    part.blocks = [] if weights else [block for block in part.blocks if block[0] == "weight"]
    if first:
        part.blocks.append(("weight", indices[:first], seen[:first]))
    if len(tensors) > first:
        part.blocks.append(("gradient", indices[first:], seen[first:]))


def complete(part: Part, wanted: Wanted) -> None:
    """Read what the step changed; to be called after everything that belongs to the step."""
    for entry in part.entries:
        defect = _defect(entry)
        if defect is not None:
            part.defects[entry.index] = defect
    if not part.snapshot:
        return
    changes = []
    for entry, before in zip(part.entries, part.snapshot, strict=True):
        now = wanted.share(entry.param)
        if now.dtype in _HALF:  # their difference need not be one of their own numbers
            changes.append(now.float() - before.float())
        else:
            changes.append(torch.sub(now, before, out=before))
    part.snapshot = []
    seen = statistics(changes, histogram=wanted.histogram)
    part.blocks.append(("update", [entry.index for entry in part.entries], seen))
    # On the CPU it is known already where everything moved, and nothing has to be compared.
    zeros = seen.zeros.tolist() if seen.zeros.is_cpu else [1] * len(changes)
    for entry, change, some in zip(part.entries, changes, zeros, strict=True):
        gradient = entry.param.grad
        if gradient is not None and gradient.layout is torch.strided:
            still = ((wanted.share(gradient) != 0) & (change == 0)).sum() if some else _NONE
            part.still[entry.index] = still


@dataclass(frozen=True)
class Arrived:
    """The numbers of a look on the host."""

    rows: dict[str, Rows]
    columns: dict[str, Array]
    skipped: bool
    scale: float
    steps: list[int]
    squares: list[float]
    skips: int
    overflows: dict[int, tuple[int, ...]]
    first: list[list[float]]
    clocks: list[float]


@final
class Packed:
    """All numbers of a look as one tensor on its way to the host.

    Where ranks hold shards, what they saw is put together here: one sum and one maximum over the
    ranks, whatever the number of parameters.

    Args:
        parts: What the optimizers contributed.
        total: Number of entries of the model.
        sentinel: What was seen between the looks.
        clocks: Times of this rank; the largest over ranks come back.
        shared: Whether each rank saw a part only.
        base: A step before all that the sentinel saw.

    Attributes:
        stage: Where the gradients were read.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        total: int,
        sentinel: Sentinel,
        clocks: Sequence[float],
        shared: bool,
        base: int,
    ) -> None:
        self.stage = " and ".join(sorted({part.stage for part in parts if part.stage}))
        self._total = total
        self._skipped = any(part.skipped for part in parts)
        blocks = [block for part in parts for block in part.blocks]
        self._where = [(quantity, indices) for quantity, indices, _ in blocks]
        self._rates = {e.index: r for p in parts for e, r in zip(p.entries, p.rates, strict=True)}
        held = [entry for part in parts for entry in part.entries]
        self._digits = {e.index: _HALF[e.dtype] for e in held if e.dtype in _HALF}
        home = sentinel.device
        # ~ the one list of what is added over ranks, the other of what the largest is taken of
        sums: dict[str, Tensor] = {}
        most: dict[str, Tensor] = {}
        self._count = sum(len(indices) for _, indices in self._where)
        if self._count:
            packed = Statistics.cat([seen.to(home) for _, _, seen in blocks]).pack()
            sums["rows"], most["rows"] = packed[: -3 * self._count], packed[-3 * self._count :]
        still = {index: x for part in parts for index, x in part.still.items()}
        defects = {index: x for part in parts for index, x in part.defects.items()}
        self._still, self._defects = list(still), list(defects)
        taken = sentinel.take()
        self._steps, sums["squares"], first = taken.steps, taken.squares, taken.first
        most["overflows"] = taken.overflows
        sums["still"] = _row(still.values(), home)
        most["defects"] = _row(defects.values(), home)
        most["overflow"] = _row([p.how.overflow for p in parts if p.how.overflow is not None], home)
        most["scale"] = _row([p.how.scale for p in parts if p.how.scale is not None], home)
        most["clocks"] = torch.tensor(clocks, dtype=torch.float64, device=home)
        if shared:
            dist = torch.distributed
            first = (first - base) * dist.get_world_size() + dist.get_rank()
        most["first"] = -first
        self._sizes = [(name, len(x)) for name, x in (*_named(sums, "+"), *_named(most, "^"))]
        additive, largest = torch.cat(list(sums.values())), torch.cat(list(most.values()))
        if shared:
            dist.all_reduce(additive)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        self._event: Any = None
        numbers = torch.cat([additive, largest])
        if numbers.is_cuda:
            self._host = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host = numbers.cpu()

    @property
    def ready(self) -> bool:
        """Whether the copy has arrived."""
        return self._event is None or bool(self._event.query())

    def read(self) -> Arrived:
        """The numbers; waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        got: dict[str, Tensor] = {}
        at = 0
        for name, size in self._sizes:
            got[name] = self._host[at : at + size]
            at += size
        skipped = self._skipped or bool((got["^overflow"] != 0).any())
        rows = {}
        if self._count:
            packed = torch.cat([got["+rows"], got["^rows"]])
            rows = self._rows(Statistics.unpack(packed, self._count))
        columns = {"lr": self._column(self._rates)}
        if self._digits:
            columns["digits"] = self._column(self._digits)
        if len(self._defects):
            columns["defect"] = self._column(
                dict(zip(self._defects, got["^defects"].tolist(), strict=True))
            )
        if skipped:
            rows.pop("update", None)
        elif len(self._still) and "gradient" in rows:
            column = self._column(dict(zip(self._still, got["+still"].tolist(), strict=True)))
            moments = rows["gradient"].moments
            with np.errstate(invalid="ignore", divide="ignore"):
                columns["lost"] = column / (moments["count"] - moments["zeros"])
        skips, named = overflows(got["^overflows"].tolist(), self._total)
        first = (-got["^first"]).reshape(3, -1).tolist()
        return Arrived(
            rows=rows,
            columns=columns,
            skipped=skipped,
            scale=max(got["^scale"].tolist(), default=1.0),
            steps=self._steps,
            squares=got["+squares"].tolist(),
            skips=skips,
            overflows=named,
            first=first,
            clocks=got["^clocks"].tolist(),
        )

    def _rows(self, seen: Statistics) -> dict[str, Rows]:
        moments: dict[str, dict[str, Array]] = {}
        histograms: dict[str, Array] = {}
        start = 0
        for quantity, indices in self._where:
            part = seen[start : start + len(indices)]
            start += len(indices)
            whole = moments.setdefault(quantity, _no_moments(self._total))
            for name in MOMENTS:
                whole[name][indices] = getattr(part, name).numpy()
            if part.histogram is not None:
                empty = np.zeros((self._total, BINS), np.int64)
                histograms.setdefault(quantity, empty)[indices] = part.histogram.numpy()
        return {
            quantity: Rows(
                whole, Filled.of(histograms[quantity]) if quantity in histograms else None
            )
            for quantity, whole in moments.items()
        }

    def _column(self, values: Mapping[int, float]) -> Array:
        column = np.full(self._total, np.nan)
        column[list(values)] = list(values.values())
        return column


def _no_moments(total: int) -> dict[str, Array]:
    whole = ("count", "zeros", "nonfinite")
    moments = {name: np.zeros(total, np.int64 if name in whole else np.float64) for name in MOMENTS}
    moments["min"] = np.full(total, math.inf)
    moments["max"] = np.full(total, -math.inf)
    return moments


def _row(values: Iterable[Tensor], home: torch.device) -> Tensor:
    listed = [value.detach().reshape(1).to(home, torch.float64) for value in values]
    return torch.cat(listed) if listed else torch.zeros(0, dtype=torch.float64, device=home)


def _named(tensors: Mapping[str, Tensor], mark: str) -> list[tuple[str, Tensor]]:
    return [(mark + name, x) for name, x in tensors.items()]


def _defect(entry: Entry) -> Tensor | None:
    """How far the parameter is from the set it was declared to stay in."""
    constraint = next((p.note.get("constraint") for p in entry.places), None)
    violation = getattr(constraint, "violation", None)
    if violation is None or is_dtensor(entry.param):  # a shard is not a point of the set
        return None
    found = torch.as_tensor(violation(entry.param.detach())).detach().double()
    return found.max() if found.numel() else None
