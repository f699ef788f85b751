"""Compare what initialisers aimed at with what the parameters hold."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learnables.entries import entries
from learnables.init.base import Initializer


@dataclass(frozen=True)
class InitRow:
    """One declared parameter.

    Attributes:
        name: Its qualified name.
        shape: Its shape.
        init: How it was declared to start.
        wanted: Standard deviation that the initialiser aims at; None where it aims at none.
        mean: Mean found; its absolute value for a complex parameter.
        std: Standard deviation found.
        off: Whether ``std`` is farther from ``wanted`` than chance and rounding explain or, where
            the initialiser draws nothing, any value is another.
    """

    name: str
    shape: tuple[int, ...]
    init: str
    wanted: float | None
    mean: float
    std: float
    off: bool


@dataclass(frozen=True, repr=False)
class InitReport:
    """What every declared parameter of a model was to start with, and does.

    Attributes:
        rows: One for each declared parameter, in the order of the walk.
    """

    rows: tuple[InitRow, ...]

    @property
    def off(self) -> tuple[InitRow, ...]:
        """The rows that do not look as declared."""
        return tuple(row for row in self.rows if row.off)

    def __repr__(self) -> str:
        head = ("parameter", "shape", "initialiser", "wanted std", "found std", "found mean", "")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*table, f"{len(self.rows)} declared, {len(self.off)} off"])


def report(model: nn.Module) -> InitReport:
    """Wanted and found standard deviation of every parameter with a declared initialiser.

    Meant for the moment before training. A row is *off* where the standard deviation found lies
    more than six standard errors and a rounding step from the one wanted, or where an initialiser
    that draws nothing would give other values. So it also shows what loading, casting or a
    hand-written ``reset_parameters`` did to a parameter.

    Returns:
        An `InitReport`; printing it shows the table, ``.off`` holds the rows that surprise.

    Example:
        >>> import learnables as ln
        >>> model = nn.Module()
        >>> model.bank = ln.parameter(4, 256, 64, init=ln.init.kaiming_normal(), role="experts")
        >>> found = ln.init.report(model)
        >>> found.rows[0].wanted, len(found.off)
        (0.08838834764831845, 0)

    Cost:
        Two passes over each declared parameter; one number back from the device for each.
    """
    rows = []
    for entry in entries(model):
        place = next((p for p in entry.places if p.note.get("init") is not None), None)
        if place is None or entry.param.device.type == "meta":
            continue
        init, role = place.note.get("init"), place.note.get("role")
        wanted = init.wanted_std(entry.shape, role=role) if isinstance(init, Initializer) else None
        mean, std = _moments(entry.param)
        shown = repr(init) if isinstance(init, Initializer) else getattr(init, "__name__", "?")
        if isinstance(init, Initializer) and init.deterministic:
            fresh = init(torch.empty_like(entry.param), role=role)
            wanted = _moments(fresh)[1]
            # One rounding of fp32 apart, as after a later cast to fp64, is still the same.
            near = 2 * max(torch.finfo(entry.dtype).eps, torch.finfo(torch.float32).eps)
            off = not torch.allclose(fresh, entry.param, rtol=near, atol=0)
        else:
            off = wanted is not None and _off(wanted, std, entry.param)
        rows.append(InitRow(entry.name, tuple(entry.shape), shown, wanted, mean, std, off))
    return InitReport(tuple(rows))


def _moments(x: Tensor) -> tuple[float, float]:
    """Mean (absolute, if complex) and standard deviation, in at least fp32."""
    x = x.detach()
    x = x if x.is_complex() or x.dtype.itemsize >= 4 else x.float()
    if not x.numel():
        return 0.0, 0.0
    mean = x.mean().abs() if x.is_complex() else x.mean()
    found: list[float] = torch.stack([mean, x.std(correction=0)]).tolist()
    return found[0], found[1]


def _off(wanted: float, found: float, param: nn.Parameter) -> bool:
    """Whether chance (six standard errors of a normal's deviation) and rounding do not explain."""
    if not math.isfinite(found):
        return True
    rounding = torch.finfo(param.dtype).eps
    chance = 6 / math.sqrt(2 * max(param.numel(), 1))
    return abs(found - wanted) > wanted * min(chance + rounding, 1.0)


def _cells(row: InitRow) -> tuple[str, ...]:
    wanted = "–" if row.wanted is None else f"{row.wanted:.3g}"
    shape = "×".join(map(str, row.shape))
    mark = "off" if row.off else ""
    return row.name, shape, row.init, wanted, f"{row.std:.3g}", f"{row.mean:.3g}", mark
