"""Parameters in every layout, under every optimizer, with what really happens to their values.

A *cell* is one layout, one optimizer, one way to compute its step (fused, foreach, a loop), and
one process or DDP. Its truth is measured: the cell is trained beside its twin, which is row-major
and not fused, and the two are compared, together with the memory around the parameter. What the
audit says of the cell is held against that. ``benchmarks/layout.py`` prints the counts.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import learnables as ln
from learnables.auditing.rule import Finding

MATRIX, TOKEN, KERNEL, POINT, ROW = (6, 5), (1, 1, 30), (6, 3, 3, 3), (6, 4, 1, 1), (1, 30)
AROUND = 7.25  # fills the memory around a view, so that a foreign write shows
STEPS = 3
OURS = ("LRN601", "LRN602", "LRN62")


# --- layouts -------------------------------------------------------------------------------------


def same(x: Tensor) -> Tensor:
    return x.clone()


def first(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def last(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.channels_last)


def turned(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def permuted(x: Tensor) -> Tensor:
    return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


def odd_one(x: Tensor) -> Tensor:
    """Contiguous, but for the strides of its dimensions of size 1."""
    return x.clone().as_strided(x.shape, (1,) * x.ndim)


def every_second(x: Tensor) -> Tensor:
    big = _around(*x.shape[:-1], 2 * x.shape[-1])
    big[..., ::2] = x
    return big[..., ::2]


def left_part(x: Tensor) -> Tensor:
    """As a split matrix has it."""
    big = _around(*x.shape[:-1], x.shape[-1] + 3)
    big[..., :-3] = x
    return big[..., :-3]


def middle_rows(x: Tensor) -> Tensor:
    """A part of a bigger tensor without gaps."""
    big = _around(x.shape[0] + 4, *x.shape[1:])
    big[2:-2] = x
    return big[2:-2]


def windows(x: Tensor) -> Tensor:
    """Rows that overlap: each begins in the middle of the one before."""
    return _around(4 * x.numel()).as_strided(x.shape, (2, 1)).copy_(x)


def expanded(x: Tensor) -> Tensor:
    """One row that stands for all, in a pool with room behind it."""
    pool = _around(4 * x.numel())
    pool[: x.shape[-1]] = x[0]
    return pool[: x.shape[-1]].expand(x.shape)


def _around(*shape: int) -> Tensor:
    return torch.full(shape, AROUND, dtype=torch.float64)


@dataclass(frozen=True)
class Layout:
    """How parameter, gradient and moments of a cell lie.

    Attributes:
        make: From row-major values to the parameter's memory.
        shape: Of the parameter.
        read: What the loss sees of the parameter.
        gradient: What is done to the gradient before each step.
        moments: What is done to the optimizer state after the first step.
    """

    make: Callable[[Tensor], Tensor]
    shape: tuple[int, ...] = MATRIX
    read: Callable[[Tensor], Tensor] = lambda x: x
    gradient: Callable[[Tensor], Tensor] | None = None
    moments: Callable[[Tensor], Tensor] | None = None


COEFFICIENTS = torch.linspace(-1, 1, 90, dtype=torch.float64).reshape(3, 30)
IMAGES = torch.linspace(-1, 1, 72, dtype=torch.float64).reshape(2, 4, 3, 3)
IMAGES = IMAGES.to(memory_format=torch.channels_last)
LAYOUTS = {
    "row-major": Layout(first),
    "row-major token": Layout(first, TOKEN),
    "row-major kernel": Layout(first, KERNEL),
    "column-major": Layout(turned),
    "channels last": Layout(last, KERNEL),
    "permuted kernel": Layout(permuted, KERNEL),
    "rows of a bigger tensor": Layout(middle_rows),
    "columns of a bigger tensor": Layout(left_part),
    "every second column": Layout(every_second),
    "every second column of a kernel": Layout(every_second, KERNEL),
    "every second column of a token": Layout(every_second, TOKEN),
    "overlapping windows": Layout(windows),
    "expanded": Layout(expanded),
    "odd strides of size 1": Layout(odd_one, TOKEN),
    "read through a permutation": Layout(first, KERNEL, read=permuted),
    "read transposed": Layout(first, read=turned),
    "row read by einsum": Layout(
        first, ROW, read=lambda x: torch.einsum("bi,oi->bo", COEFFICIENTS, x)
    ),
    "1 x 1 kernel over images channels last": Layout(
        first, POINT, read=lambda x: F.conv2d(IMAGES, x)
    ),
    "gradient of its own, as it should be": Layout(first, gradient=same),
    "gradient column by column": Layout(first, gradient=turned),
    "gradient row by row": Layout(turned, gradient=first),
    "gradient row by row of channels last": Layout(last, KERNEL, gradient=first),
    "gradient channels last": Layout(first, KERNEL, gradient=last),
    "gradient with odd strides of size 1": Layout(first, TOKEN, gradient=odd_one),
    "gradient of every second column": Layout(every_second, gradient=every_second),
    "moments of their own, as they should be": Layout(last, KERNEL, moments=same),
    "moments column by column": Layout(first, moments=turned),
    "moments row by row": Layout(turned, moments=first),
    "moments of before channels last": Layout(last, KERNEL, moments=first),
    "moments channels last": Layout(first, KERNEL, moments=last),
    "moments with odd strides of size 1": Layout(first, TOKEN, moments=odd_one),
}

# --- optimizers ----------------------------------------------------------------------------------

FUSED = {
    "Adam": lambda p, **how: torch.optim.Adam(p, lr=0.05, **how),
    "Adam, amsgrad": lambda p, **how: torch.optim.Adam(p, lr=0.05, amsgrad=True, **how),
    "AdamW": lambda p, **how: torch.optim.AdamW(p, lr=0.05, **how),
    "SGD": lambda p, **how: torch.optim.SGD(p, lr=0.05, **how),
    "SGD, momentum": lambda p, **how: torch.optim.SGD(p, lr=0.05, momentum=0.9, **how),
    "SGD, Nesterov": lambda p, **how: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, **how
    ),
    "Adagrad": lambda p, **how: torch.optim.Adagrad(p, lr=0.05, **how),
}
OTHERS = {
    kind.__name__: lambda p, kind=kind, **how: kind(p, **how)
    for kind in (
        torch.optim.RMSprop,
        torch.optim.Adadelta,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.ASGD,
        torch.optim.Rprop,
        torch.optim.Adafactor,
    )
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {**FUSED, **OTHERS}
WAYS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}


# --- cells ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """One parameter in the layout of the cell, and one that is as it should be."""

    def __init__(self, value: Tensor, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.odd = nn.Parameter(value)
        self.rest = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4))

    def forward(self) -> Tensor:
        return _distance(self.read(self.odd)) + _distance(self.rest)


def _distance(x: Tensor) -> Tensor:
    """A loss with another gradient for each element."""
    places = torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape)
    return (x.sub(places.cos()).square() * (1 + places)).sum() / x.numel()


@dataclass(frozen=True)
class Cell:
    """One layout, optimizer and way; ``ddp`` in the process group that exists."""

    layout: str
    optimizer: str
    way: str
    ddp: bool = False

    def build(self, repair: bool = False) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        """Model, optimizer and step; ``repair`` lays everything out before each step."""
        return self._build(LAYOUTS[self.layout], repair=repair)

    def twin(self, way: str | None = None) -> Tensor:
        """What the parameter should be after ``STEPS`` steps: row-major, not fused, no DDP."""
        layout = LAYOUTS[self.layout]
        way = way or ("loop" if self.way == "fused" else self.way)
        plain = replace(layout, make=first, gradient=None, moments=layout.moments and first)
        alone = Cell(self.layout, self.optimizer, way)
        model, _, step = alone._build(plain, as_expanded=layout.make is expanded)
        for _ in range(STEPS):
            step()
        return model.odd.detach()

    def _build(
        self, layout: Layout, *, repair: bool = False, as_expanded: bool = False
    ) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        count = torch.Size(layout.shape).numel()
        values = torch.linspace(-2, 3, count, dtype=torch.float64).reshape(layout.shape)
        if as_expanded:
            values = values[:1].expand_as(values)
        net = Net(layout.make(values.clone()), layout.read)
        if repair:
            ln.canonicalize_(net)
        model: nn.Module = nn.parallel.DistributedDataParallel(net) if self.ddp else net
        optimizer = OPTIMIZERS[self.optimizer](model.parameters(), **WAYS[self.way])

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = model()
            loss.backward()
            if layout.gradient is not None:
                net.odd.grad = layout.gradient(net.odd.grad)
            if repair:
                ln.canonicalize_(model, optimizer)
            optimizer.step()
            return loss

        if layout.moments is not None:
            step()
            state = optimizer.state[net.odd]
            for key, x in state.items():
                if isinstance(x, Tensor) and x.shape == net.odd.shape:
                    state[key] = layout.moments(x)
        return model, optimizer, step


@dataclass
class Truth:
    """What really happens in a cell.

    Attributes:
        wrong: Values differ from the twin's, foreign memory was written, or the step raises.
        told: torch refuses to wrap it in DDP, or warns of the strides of its gradients.
        why: In words.
    """

    wrong: bool = False
    told: bool = False
    why: list[str] = field(default_factory=list)


def truth(cell: Cell) -> Truth:
    """Train the cell beside its twin, and look around the parameter."""
    found = Truth()
    torch.set_warn_always(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model, _, step = cell.build()
        except RuntimeError as error:
            found.told = found.wrong = True
            found.why.append(f"cannot be built: {error}")
            return found
        finally:
            torch.set_warn_always(False)
        torch.set_warn_always(True)
        try:
            for _ in range(STEPS):
                step()
        except RuntimeError as error:
            found.wrong = True
            found.why.append(f"raises: {error}")
        finally:
            torch.set_warn_always(False)
    odd = getattr(model, "module", model).odd.detach()
    if not torch.allclose(odd, cell.twin(), rtol=1e-9, atol=1e-12):
        found.wrong = True
        found.why.append("the values are wrong")
    if _foreign_memory(odd).ne(AROUND).any():
        found.wrong = True
        found.why.append("foreign memory was written")
    if any("Grad strides do not match" in str(w.message) for w in caught):
        found.told = True
        found.why.append("DDP warns")
    return found


def _foreign_memory(x: Tensor) -> Tensor:
    """Every element of the storage that is none of the parameter's."""
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    mine = torch.zeros(whole.numel(), dtype=torch.bool)
    mine.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    return whole[~mine]


def verdict(cell: Cell) -> list[Finding]:
    """The findings of the layout rules; of the bare model where DDP refuses to wrap it."""
    try:
        model, optimizer, step = cell.build()
    except RuntimeError:
        model, optimizer, step = replace(cell, ddp=False).build()
    report = ln.audit(model, optimizer, step, steps=2, select=list(OURS))
    return list(report.findings)


def judge(cell: Cell) -> list[str]:
    """How the audit and the truth of a cell disagree; nothing where they agree.

    An error has to mean that training goes wrong, and the reverse. Under DDP, a warning of the two
    rules about it has to mean that torch warns. Nothing but the odd parameter may be accused.
    """
    happened, findings = truth(cell), verdict(cell)
    said = [f"{f.severity} {f.code} {', '.join(f.where)}" for f in findings]
    odd = ["module.odd"] if cell.ddp else ["odd"]
    complaints = [f"accused: {f.where}" for f in findings if f.where not in (odd, ["odd"])]
    if happened.wrong != any(f.severity == "error" for f in findings):
        complaints.append(f"{happened.why or 'nothing is wrong'}, but {said or 'nothing is said'}")
    loud = any(f.severity == "warning" and f.code in ("LRN622", "LRN623") for f in findings)
    if cell.ddp and not happened.wrong and happened.told != loud:
        complaints.append(f"{happened.why or 'DDP is content'}, but {said or 'nothing is said'}")
    return complaints


def repaired(cell: Cell) -> Tensor:
    """The parameter after ``STEPS`` steps with `ln.canonicalize_` before each."""
    model, _, step = cell.build(repair=True)
    for _ in range(STEPS):
        step()
    return getattr(model, "module", model).odd.detach()


# --- who refuses a layout ------------------------------------------------------------------------


def _safetensors(model: nn.Module) -> object:
    return save({"odd": model.odd.detach()})


def _alone_in_ddp(model: nn.Module) -> object:
    lone = nn.Module()
    lone.odd = model.odd
    return nn.parallel.DistributedDataParallel(lone)


CONSUMERS: dict[str, Callable[[nn.Module], object]] = {
    "safetensors": _safetensors,
    "DDP": _alone_in_ddp,
    "FSDP2": fully_shard,  # last: it changes the model
}


def refusals(layout: str) -> dict[str, tuple[bool, bool, bool]]:
    """Consumer → whether it refuses the layout, whether a finding names it, whether one is loud.

    Of a module that has no other parameter; in a process group.
    """
    model, _, _ = Cell(layout, "SGD", "loop").build()
    findings = ln.audit(model, select=list(OURS)).findings
    loud = any(f.severity == "error" for f in findings)
    found = {}
    for name, consume in CONSUMERS.items():
        try:
            consume(model)
            refused = False
        except (RuntimeError, ValueError, NotImplementedError):
            refused = True
        found[name] = (refused, any(name in f"{f.what} {f.found}" for f in findings), loud)
    return found


def cells(optimizers: list[str], *, ddp: bool = False) -> list[Cell]:
    """All layouts × these optimizers × the ways each of them has."""
    return [
        Cell(layout, optimizer, way, ddp)
        for layout in LAYOUTS
        for optimizer in optimizers
        for way in WAYS
        if way != "fused" or optimizer in FUSED
    ]
