"""One look at a step: read before it, complete after it, pack, and read on the host."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from learnables.entries import Entry
from learnables.stats import Statistics, statistics
from learnables.watching.encoding import Array
from learnables.watching.gradient import Consumption, consumed, consumption, learning_rates
from learnables.watching.observation import MOMENTS, Rows

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Wanted:
    """What a look is to bring home."""

    quantities: tuple[str, ...]
    histogram: bool


@dataclass
class Part:
    """What one optimizer contributes to a look; ``entries`` are those it holds.

    ``blocks`` are statistics of one quantity, with the index of the entry for each row.
    """

    entries: list[Entry]
    how: Consumption
    rates: list[float]
    stage: str = "step"
    blocks: list[tuple[str, list[int], Statistics]] = field(default_factory=list)
    snapshot: list[Tensor] = field(default_factory=list)
    lost: dict[int, Tensor] = field(default_factory=dict)
    defects: dict[int, Tensor] = field(default_factory=dict)


def begin(optimizer: Optimizer, entries: Sequence[Entry], wanted: Wanted) -> Part:
    """Read weights and gradients, and keep the weights; to be called before the step."""
    rates = learning_rates(optimizer)
    held = [entry for entry in entries if entry.param in rates]
    how = consumption(optimizer)
    part = Part(held, how, [rates[entry.param] for entry in held], how.stage)
    read_gradients(part, wanted)
    if "update" in wanted.quantities:
        part.snapshot = [entry.param.detach().clone() for entry in held]
    return part


def read_gradients(part: Part, wanted: Wanted) -> None:
    """Read weights and gradients into ``part``, in place of what it held of them."""
    indices: list[int] = []
    tensors: list[Tensor] = []
    if "weight" in wanted.quantities:
        indices += [entry.index for entry in part.entries]
        tensors += [entry.param.detach() for entry in part.entries]
    weights = len(tensors)
    if "gradient" in wanted.quantities:
        there = [(e.index, e.param.grad) for e in part.entries if e.param.grad is not None]
        indices += [index for index, _ in there]
        tensors += consumed([gradient.detach() for _, gradient in there], part.how)
    seen = statistics(tensors, histogram=wanted.histogram)
    part.blocks = []
    if weights:
        part.blocks.append(("weight", indices[:weights], seen[:weights]))
    if len(tensors) > weights:
        part.blocks.append(("gradient", indices[weights:], seen[weights:]))


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
        now = entry.param.detach()
        if now.dtype in _HALF:  # their difference need not be one of their own numbers
            changes.append(now.float() - before.float())
        else:
            changes.append(torch.sub(now, before, out=before))
        if entry.param.grad is not None:
            part.lost[entry.index] = _lost(entry.param.grad.detach(), changes[-1])
    part.snapshot = []
    seen = statistics(changes, histogram=wanted.histogram)
    part.blocks.append(("update", [entry.index for entry in part.entries], seen))


@final
class Packed:
    """All numbers of a look as one tensor on its way to the host.

    Args:
        parts: What the optimizers contributed.
        total: Number of entries of the model.

    Attributes:
        stage: Where the gradients were read.
    """

    def __init__(self, parts: Sequence[Part], total: int) -> None:
        blocks = [block for part in parts for block in part.blocks]
        self._where = [(quantity, indices) for quantity, indices, _ in blocks]
        self._total = total
        self.stage = " and ".join(sorted({part.stage for part in parts}))
        self._columns: list[tuple[str, list[int]]] = []
        numbers: list[Tensor] = []
        home = blocks[0][2].count.device if blocks else torch.device("cpu")
        everything = Statistics.cat([seen.to(home) for _, _, seen in blocks]) if blocks else None
        self._count = len(everything) if everything is not None else 0
        if everything is not None:
            numbers.append(everything.pack())
        for name in ("lost", "defect"):
            found = {k: v for part in parts for k, v in getattr(part, _FIELD[name]).items()}
            self._columns.append((name, list(found)))
            numbers += [value.reshape(1).double().to(home) for value in found.values()]
        for flag in (part.how.overflow for part in parts):
            numbers.append(_number(flag, 0.0, home))
        for scale in (part.how.scale for part in parts):
            numbers.append(_number(scale, 1.0, home))
        self._parts = len(parts)
        self._rates = {e.index: r for p in parts for e, r in zip(p.entries, p.rates, strict=True)}
        device = torch.cat(numbers)
        self._event: Any = None
        if device.is_cuda:
            self._host = torch.empty_like(device, device="cpu", pin_memory=True)
            self._host.copy_(device, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host = device.cpu()

    @property
    def ready(self) -> bool:
        """Whether the copy has arrived."""
        return self._event is None or bool(self._event.query())

    def read(self) -> tuple[dict[str, Rows], dict[str, Array], bool, float]:
        """Rows, columns, whether the step was skipped, and the loss scale; waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        host = self._host
        tail = host[len(host) - 2 * self._parts :].tolist()
        skipped, scale = any(tail[: self._parts]), max(tail[self._parts :], default=1.0)
        length = len(host) - 2 * self._parts - sum(len(indices) for _, indices in self._columns)
        rows = self._rows(Statistics.unpack(host[:length], self._count) if self._count else None)
        if skipped:
            rows.pop("update", None)
        columns = {"lr": self._column(self._rates)}
        at = length
        for name, indices in self._columns:
            values = host[at : at + len(indices)].tolist()
            at += len(indices)
            if not (skipped and name == "lost"):
                columns[name] = self._column(dict(zip(indices, values, strict=True)))
        return rows, columns, skipped, scale

    def _rows(self, seen: Statistics | None) -> dict[str, Rows]:
        found: dict[str, Rows] = {}
        start = 0
        for quantity, indices in self._where:
            assert seen is not None
            part = seen[start : start + len(indices)]
            start += len(indices)
            if quantity not in found:
                found[quantity] = _no_rows(self._total, part.histogram is not None)
            rows = found[quantity]
            for name in MOMENTS:
                rows.moments[name][indices] = getattr(part, name).numpy()
            if rows.histogram is not None and part.histogram is not None:
                rows.histogram[indices] = part.histogram.numpy()
        return found

    def _column(self, values: Mapping[int, float]) -> Array:
        column = np.full(self._total, np.nan)
        column[list(values)] = list(values.values())
        return column


_FIELD = {"lost": "lost", "defect": "defects"}


def _no_rows(total: int, histogram: bool) -> Rows:
    whole = ("count", "zeros", "nonfinite")
    moments = {name: np.zeros(total, np.int64 if name in whole else np.float64) for name in MOMENTS}
    moments["min"] = np.full(total, math.inf)
    moments["max"] = np.full(total, -math.inf)
    return Rows(moments, np.zeros((total, 512), np.int64) if histogram else None)


def _number(value: Tensor | None, default: float, home: torch.device) -> Tensor:
    if value is None:
        return torch.full((1,), default, dtype=torch.float64, device=home)
    return value.detach().reshape(1).to(home, torch.float64)


def _lost(gradient: Tensor, change: Tensor) -> Tensor:
    """Share of the elements with a gradient that did not change at all."""
    if gradient.layout is not torch.strided or gradient.shape != change.shape:
        return torch.full((), math.nan, dtype=torch.float64)
    moved = gradient != 0
    still = moved & (change == 0)
    return still.sum().double() / moved.sum()


def _defect(entry: Entry) -> Tensor | None:
    """How far the parameter is from the set it was declared to stay in."""
    constraint = next((p.note.get("constraint") for p in entry.places), None)
    violation = getattr(constraint, "violation", None)
    if violation is None:
        return None
    found = violation(entry.param.detach())
    return torch.as_tensor(found).detach().double().max()
