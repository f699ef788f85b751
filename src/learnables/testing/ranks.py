"""Whether everything gives the same answer on one process and on many: a table of this machine.

Each column is a real group of processes that trains the same small model on the same data, each
process on its share. Each row is one part of the library, compared with what one process says.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.optim import Optimizer

from learnables import sets
from learnables._torch import end_process_group, gather
from learnables.auditing.run import audit
from learnables.declare import parameter
from learnables.init import normal, orthogonal
from learnables.launch import Strategy, prepare
from learnables.policy.groups import param_groups
from learnables.runtime.checkpoint import read_checkpoint, save_checkpoint
from learnables.runtime.restoring import load_checkpoint
from learnables.sets.registration import violation
from learnables.sharing.tie import tie
from learnables.stats import statistics
from learnables.watching.recorder import watch
from learnables.watching.run import Run

ROWS = ("audit", "statistics", "watch", "projection", "checkpoint")
TOLERANCE = 1e-8
"""Largest relative difference between trained numbers: sums over ranks round otherwise. The job
runs in double precision, so that rounding hides nothing else."""
_STEPS, _BATCH, _WIDTH = 4, 8, 16


@final
@dataclass(frozen=True)
class Cell:
    """One row of one column.

    Attributes:
        equal: Whether it is the answer of one process.
        difference: The largest relative difference among its numbers; 0.0 is bit-equal.
        why: What differs, where something does.
    """

    equal: bool
    difference: float
    why: str = ""


@final
@dataclass(frozen=True)
class EqualityTable:
    """What `compare_ranks_with_one` found.

    Attributes:
        cells: Column such as ``"fsdp2 × 4"`` → row → cell.
        device: Where the processes computed.
    """

    cells: dict[str, dict[str, Cell]]
    device: str

    @property
    def all_equal(self) -> bool:
        """Whether every cell is."""
        return all(cell.equal for column in self.cells.values() for cell in column.values())

    def __str__(self) -> str:
        """The table, with a line for each cell that is not equal."""
        lines = [["", *self.cells]]
        for row in ROWS:
            lines.append([row, *(_in_words(column[row]) for column in self.cells.values())])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = [
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        for name, column in self.cells.items():
            text += [f"{name}, {r}: {cell.why}" for r, cell in column.items() if not cell.equal]
        text.append(
            f"against one process on {self.device}; exact: bit for bit, "
            f"else the largest relative difference, equal up to {TOLERANCE:g}"
        )
        return "\n".join(text)


def _in_words(cell: Cell) -> str:
    if not cell.equal:
        return "DIFFERS"
    return "exact" if cell.difference == 0 else f"equal {cell.difference:.0e}"


def compare_ranks_with_one(
    ranks: Sequence[int] = (2, 4),
    strategies: Sequence[Strategy] = ("ddp", "fsdp2"),
    *,
    device: str = "cpu",
) -> EqualityTable:
    """Run the same job on one process and on groups of processes, and compare what they say.

    Args:
        ranks: Sizes of groups.
        strategies: What they do.
        device: ``"cpu"`` over gloo, ``"cuda"`` over NCCL with a GPU for each process.

    Returns:
        The table.

    Cost:
        One start of torch per process, and a second of work; a minute for all of it on two cores.
    """
    cells: dict[str, dict[str, Cell]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = _answers_of(folder, "none", 1, device)
        for strategy in strategies:
            for size in ranks:
                many = _answers_of(folder, strategy, size, device)
                cells[f"{strategy} × {size}"] = {
                    row: compare_answers(one[row], many[row]) for row in ROWS
                }
    return EqualityTable(cells, device)


def _answers_of(folder: Path, strategy: Strategy, size: int, device: str) -> dict[str, Any]:
    """What a group of new processes says; they meet in a file, as a free port may be taken soon."""
    out = folder / f"{strategy}-{size}"
    out.mkdir()
    start_processes(  # type: ignore[no-untyped-call]
        _enter,
        args=(str(folder), str(out), strategy, size, device),
        nprocs=size,
        start_method="spawn",
    )
    answers: dict[str, Any] = json.loads((out / "answers.json").read_text(encoding="utf-8"))
    return answers


def _enter(rank: int, folder: str, out: str, strategy: Strategy, size: int, device: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    if device == "cuda":
        torch.cuda.set_device(rank)
    if size > 1:
        torch.distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=f"file://{out}/meeting",
            rank=rank,
            world_size=size,
        )
    said = _answers(rank, size, strategy, Path(folder), Path(out), device)
    if rank == 0:
        Path(out, "answers.json").write_text(json.dumps(said), encoding="utf-8")
    if size > 1:
        torch.distributed.barrier()  # nobody leaves while another still talks to it
        end_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that is taken down under load


# --- the job -------------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = parameter(width, width, init=orthogonal(), constraint=sets.Orthogonal())
        self.up = nn.Linear(width, width)
        self.gamma = parameter(width, init=normal(0.1), constraint=sets.Ball(0.5))

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND + torch.tanh(self.up(x_BND @ self.mix)) * self.gamma


class _Small(nn.Module):
    """Of everything that behaves differently when it is sharded, one; and three planted mistakes.

    ``unused`` enters no forward, ``cut`` is detached, ``dead`` is multiplied by zero.
    """

    def __init__(self, width: int = _WIDTH, tokens: int = 5, words: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.class_token = parameter(1, 1, width, init=normal(0.02))
        self.positions = parameter(1, tokens + 1, width, init=normal(0.02))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(1.5))  # of shape ()
        self.color = parameter(torch.eye(3), weight_decay="init")
        self.odd = nn.Parameter(torch.randn(7, 3))  # no rank count divides it
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.head = nn.Linear(width, words, bias=False)
        tie(self, "head.weight", "embedding.weight")
        self.unused = nn.Parameter(torch.randn(4))
        self.cut = nn.Parameter(torch.randn(width))
        self.dead = nn.Parameter(torch.randn(width))

    def forward(self, words_BN: Tensor) -> Tensor:
        x_BND = self.embedding(words_BN)
        x_BND = torch.cat([self.class_token.expand(len(x_BND), -1, -1), x_BND], 1) + self.positions
        x_BND = x_BND * self.scale + self.cut.detach() + 0 * self.dead
        for block in self.blocks:
            x_BND = block(x_BND)
        scores_BK: Tensor = self.head(x_BND[:, 0]) * (1 + (self.odd @ self.color).sin().mean())
        return scores_BK * self.frozen.sum()


def _adam(model: nn.Module) -> Optimizer:
    groups = param_groups(model, lr=1e-2, weight_decay=0.05)
    return torch.optim.AdamW(groups, lr=1e-2)


def _answers(
    rank: int, size: int, strategy: Strategy, folder: Path, out: Path, device: str
) -> dict[str, Any]:
    torch.manual_seed(0)
    whole = _Small().to(device, torch.float64)
    options: dict[str, Any] = {"find_unused_parameters": True} if strategy == "ddp" else {}
    prepared = prepare(whole, _adam, strategy, **options)
    model, optimizer = prepared.model, prepared.optimizer
    plain = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    rows = slice(rank * _BATCH // size, (rank + 1) * _BATCH // size)

    def step(number: int = 0) -> Tensor:
        drawn = torch.Generator().manual_seed(number)
        words_BN = torch.randint(12, (_BATCH, 5), generator=drawn)[rows].to(device)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(words_BN), words_BN[:, 0])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    said: dict[str, Any] = {"statistics": _statistics(plain)}
    said["audit"] = _audit(model, optimizer, step)
    watcher = watch(model, optimizer, every=1, to=out / "run", budget=None)
    with watcher:
        for number in range(_STEPS):
            step(number)
    said["watch"] = _watched(out / "run") if rank == 0 else None
    said["projection"] = {
        "values": {n: gather(p.detach()).tolist() for n, p in plain.items() if "blocks" in n},
        "violation": _violations(model),
    }
    said["checkpoint"] = _checkpoint(model, optimizer, folder, out)
    return said


def _statistics(plain: dict[str, nn.Parameter]) -> dict[str, Any]:
    seen = statistics(list(plain.values()))
    exact = ("count", "absmax", "min", "max", "zeros", "nonfinite", "histogram")
    rows = {name: getattr(seen, name).tolist() for name in exact}
    return {
        "names": list(plain),
        "exact": rows,
        "values": {"sum": seen.sum.tolist(), "squares": seen.sum_of_squares.tolist()},
    }


def _audit(model: nn.Module, optimizer: Optimizer, step: Any) -> dict[str, Any]:
    report = audit(model, optimizer, step)
    findings = [
        [f.code, f.severity, f.location, sorted(name.removeprefix("module.") for name in f.where)]
        for f in report.findings
    ]
    numbers = {
        row.name.removeprefix("module."): [
            row.value_before,
            row.value_after,
            row.gradient_first,
            row.gradient_last,
            row.update,
            row.moved,
        ]
        for row in report.parameters
    }
    return {"exact": sorted(findings, key=str), "values": numbers}


def _watched(folder: Path) -> dict[str, Any]:
    run = Run(folder)
    numbers: dict[str, Any] = {}
    for observation in run.observations:
        for quantity, rows in observation.rows.items():
            moments = rows.moments
            key = f"{observation.step} {quantity}"
            numbers[f"{key} squares"] = moments["sum_of_squares"].tolist()
            numbers[f"{key} absmax"] = moments["absmax"].tolist()
    names = [p.name.removeprefix("module.") for p in run.parameters]
    return {"exact": [names, sorted(numbers)], "values": numbers}


def _violations(model: nn.Module) -> bool:
    return all(float(v) <= 1e-4 for v in violation(model).values())


def _checkpoint(model: nn.Module, optimizer: Optimizer, folder: Path, out: Path) -> dict[str, Any]:
    """What is read from the file of one process is what is written again, bit for bit."""
    path = save_checkpoint(out / "own.safetensors", model, optimizer, step=_STEPS)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    source = folder / "none-1" / "own.safetensors"
    load_checkpoint(source, model, optimizer)
    again = save_checkpoint(out / "again.safetensors", model, optimizer, step=_STEPS)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    a, b = read_checkpoint(source), read_checkpoint(again)
    trained = read_checkpoint(path)
    return {
        "exact": [_same(a.model, b.model), _same(a.meta["optimizers"], b.meta["optimizers"])],
        "values": {n: x.tolist() for n, x in sorted(trained.model.items())},
        "names": sorted(trained.model),
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        same = isinstance(b, Tensor) and a.numel() == b.numel()
        return same and torch.equal(a.reshape(-1), b.reshape(-1))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


# --- comparing -----------------------------------------------------------------------------------


def compare_answers(one: dict[str, Any], many: dict[str, Any]) -> Cell:
    """What one process says beside what many say: ``values`` up to rounding, the rest exactly."""
    for key in sorted(one.keys() - {"values"}):
        if one[key] != many.get(key):
            return Cell(False, math.nan, f"{many.get(key)} instead of {one[key]}"[:2000])
    worst, where = 0.0, ""
    for name, value in one["values"].items():
        a, b = _flat(value), _flat(many["values"].get(name))
        if len(a) != len(b) or any((x is None) != (y is None) for x, y in zip(a, b, strict=True)):
            return Cell(False, math.nan, f"{name}: {b} instead of {a}"[:2000])
        pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None]
        size = max((abs(x) for x, _ in pairs), default=0.0) or 1.0
        for off in (abs(x - y) / size for x, y in pairs):
            if not off <= worst and not math.isnan(worst):  # NaN is the worst
                worst, where = off, name
    return Cell(worst <= TOLERANCE, worst, f"{where} differs by {worst:.1e}" if where else "")


def _flat(x: Any) -> list[Any]:
    return [y for part in x for y in _flat(part)] if isinstance(x, list) else [x]
