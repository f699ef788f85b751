"""Is the recorded gradient the one that the optimizer consumed? 48 cells, each checked bit by bit.

Every cell trains a model whose parameters are set to zero before each step, by SGD with learning
rate 1: then the new parameter *is* minus the consumed gradient, in every bit, and nothing about the
optimizer has to be trusted. (FSDP2 knows no fused SGD; the fused cells take Adam with both betas 0
and lr = eps = 2^40, whose update is 2^40 · g / (|g| + 2^40), which rounds to g.) What
`learnables.watch` recorded must have the same count, minimum, maximum, zeros and histogram, and the
same sum of squares to 1e-6. One step in each cell with a scaler overflows; it must be marked as
skipped.

Then the same inside Lightning, the transformers Trainer, Accelerate, and with optimizers that step
inside the backward: watch_trainers.py.

Beside it: what a `Tensor.register_hook`, the mechanism of `wandb.watch`, sees in the same steps.

    python benchmarks/watch_gradients.py
"""

import itertools
import math
import os
import socket
import sys
import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from environment import environment, save, write_tables
from torch import Tensor, nn

import learnables as ln
from learnables._torch import end_process_group
from learnables.watching import Run

PRECISIONS = ("fp32", "fp16, scaler, fused", "fp16, scaler", "bf16")
CELLS = list(itertools.product(PRECISIONS, (1, 4), (False, True)))
WORLDS = ("1 process", "DDP", "FSDP2")
STEPS = 3  # of which the second overflows where there is a scaler


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 6)
        self.prompt = nn.Parameter(torch.zeros(5, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.prompt.to(x.dtype).expand(len(x), -1, -1)], dim=1)
        return self.linear(x).mean(dim=1)


def cell(precision: str, accumulate: int, clip: bool, world: str, folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model: Any = Model().bfloat16() if precision == "bf16" else Model()
    rank = dist.get_rank() if dist.is_initialized() else 0
    if world == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
    elif world == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(model)
    scaled = "scaler" in precision
    fused = "fused" in precision
    big = 2.0**40
    optimizer = (
        torch.optim.Adam(model.parameters(), lr=big, betas=(0.0, 0.0), eps=big, fused=True)
        if fused
        else torch.optim.SGD(model.parameters(), lr=1.0)
    )
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
    hooked: dict[str, float] = {}
    for name, p in model.named_parameters():
        if world != "FSDP2":
            p.register_hook(lambda g, name=name: hooked.__setitem__(name, g.float().norm().item()))
    watcher = ln.watch(
        model, optimizer, every=1, to=folder, budget=None, scaler=scaler if scaled else None
    )
    consumed, moved = [], []
    for step in range(STEPS):
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        optimizer.zero_grad()
        for micro in range(accumulate):
            generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
            x = torch.randn(8, 3, 24, generator=generator)
            y = torch.randn(8, 6, generator=generator)
            if precision == "bf16":
                x, y = x.bfloat16(), y.bfloat16()
            with torch.autocast("cpu", torch.float16, enabled=scaled):
                loss = (model(x).float() - y.float()).square().mean() / accumulate
            if scaled and step == 1:
                loss = loss * math.inf
            scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        values = {n.removeprefix("module."): _whole(p) for n, p in model.named_parameters()}
        consumed.append({n: -v for n, v in values.items()})
        moved.append(dict(hooked))
    watcher.close()
    if rank:
        return {}
    assert watcher.failed is None, watcher.failed
    return judge(Run(watcher.path), consumed, moved, scaled)


def _whole(p: Tensor) -> Tensor:
    p = p.detach()
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).clone()


def judge(run: Run, consumed: list[dict[str, Tensor]], hooked: Any, scaled: bool) -> dict[str, Any]:
    equal, marked, far = True, True, 1.0
    assert [o.step for o in run.observations] == [1, 2, 3]
    for o, truth, hook in zip(run.observations, consumed, hooked, strict=True):
        overflows = scaled and o.step == 2
        marked &= o.skipped == overflows and ("update" in o.rows) != overflows
        if overflows:
            continue
        for i, name in enumerate(o.names):
            value = truth[name.removeprefix("module.")]
            want = ln.statistics([value])
            for quantity, sign in (("gradient", 1), ("update", -1)):
                rows = o.rows[quantity]
                ends = [rows.moments["min"][i], rows.moments["max"][i]]
                wanted = [want.min.item(), want.max.item()]
                if sign < 0:
                    wanted = [-wanted[1], -wanted[0]]
                equal &= ends == wanted
                equal &= rows.moments["count"][i] == value.numel()
                equal &= rows.moments["zeros"][i] == want.zeros.item()
                histogram = want.histogram[0].view(2, 256)
                # -0.0 and 0.0 are one number; the first bin of either sign holds it.
                histogram = (histogram if sign > 0 else histogram.flip(0)).numpy()
                mine = rows.histogram[i].reshape(2, 256)
                equal &= bool((histogram[:, 1:] == mine[:, 1:]).all())
                equal &= histogram[:, 0].sum() == mine[:, 0].sum()
                squares = want.sum_of_squares.item()
                equal &= math.isclose(rows.moments["sum_of_squares"][i], squares, rel_tol=1e-6)
            norm = value.float().norm().item()
            seen = hook.get(name)
            if seen is not None and norm:
                far = max(far, seen / norm, norm / seen) if math.isfinite(seen) else math.inf
    return {
        "equal": bool(equal),
        "skips marked": bool(marked),
        "stage": sorted({o.stage for o in run.observations}),
        "tensor hook is off by": round(far, 2) if hooked[0] else None,
    }


def _worker(rank: int, world: str, folder: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(_cells(world, folder), f"{folder}/{world}-{rank}.pt")
    end_process_group()


def _cells(world: str, folder: str) -> list[dict[str, Any]]:
    found = []
    warnings.filterwarnings("ignore", category=UserWarning)
    for i, (precision, accumulate, clip) in enumerate(CELLS):
        result = cell(precision, accumulate, clip, world, f"{folder}/{world}-{i}")
        row = {"precision": precision, "accumulation": accumulate, "clip": clip, "world": world}
        found.append({**row, **result})
    return found


ENGLISH = {
    "head": "precision | micro-batches | clipped | 1 process | DDP | FSDP2 | a tensor hook",
    "yes": "yes",
    "no": "no",
    "equal": "equal",
    "wrong": "**wrong**",
    "off": "off by",
    "where": (
        "torch {torch}, {system}, {date}; gloo. The last column is the mechanism of `wandb.watch`, "
        "`Tensor.register_hook`, in the same steps: how far the norm that it sees is from the one "
        "consumed, in one process and under DDP. It is not defined under FSDP2."
    ),
}
CHINESE = {
    "head": "精度 | 微批次 | 裁剪 | 单进程 | DDP | FSDP2 | 张量钩子",
    "yes": "是",
    "no": "否",
    "equal": "相同",
    "wrong": "**不同**",
    "off": "相差",
    "where": (
        "torch {torch}，{system}，{date}；gloo。最后一列是 `wandb.watch` 的机制 "
        "`Tensor.register_hook` 在同样的步里看到的：它看到的范数与被消费的范数相差多少倍，"
        "单进程与 DDP。在 FSDP2 下它没有定义。"
    ),
}


def in_words(rows: list[dict[str, Any]], words: dict[str, str]) -> list[str]:
    lines = [f"| {words['head']} |", "|---" * 7 + "|"]
    for precision, accumulate, clip in CELLS:
        cells = [
            row
            for row in rows
            if (row["precision"], row["accumulation"], row["clip"]) == (precision, accumulate, clip)
        ]
        marks = [
            words["equal" if row["equal"] and row["skips marked"] else "wrong"] for row in cells
        ]
        far = [row["tensor hook is off by"] for row in cells[:2]]
        hook = " / ".join(
            words["equal"] if x == 1 else f"{words['off']} {x:,.{0 if x >= 100 else 1}f}×"
            for x in far
        )
        clipped = words["yes" if clip else "no"]
        lines.append("| " + " | ".join([precision, str(accumulate), clipped, *marks, hook]) + " |")
    here = environment()
    return [*lines, "", words["where"].format(**{**here, "date": here["date"][:10]})]


def main() -> int:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        rows += _cells("1 process", folder)
        for world in WORLDS[1:]:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            mp.spawn(_worker, (world, folder, port), nprocs=2)
            rows += torch.load(f"{folder}/{world}-0.pt", weights_only=True)
    good = sum(row["equal"] and row["skips marked"] for row in rows)
    print("\n".join(in_words(rows, ENGLISH)))
    print(f"recorded = consumed in {good} of {len(rows)} cells")
    from watch_trainers import table  # which takes the model and the judge from here

    with tempfile.TemporaryDirectory() as folder:
        inside = table(folder)
    if "--no-save" not in sys.argv:
        save("watch_gradients", rows, good=good, cells=len(rows))
        words = {"en": ENGLISH, "zh": CHINESE}
        write_tables(
            "watch", "watch_gradients", lambda language: "\n".join(in_words(rows, words[language]))
        )
    return good != len(rows) or not all(row["equal"] and row["skips marked"] for row in inside)


if __name__ == "__main__":
    sys.exit(main())
