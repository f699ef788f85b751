"""What `learnables.prepare` costs per step, and what packed statistics save, on 2 processes.

Overhead: one model trained twice in each process, once wrapped by hand and once by `prepare`, in
turns, so that noise hits both alike; a time is that of the slower rank. The bound is the upper end
of the 95 % bootstrap interval of the median ratio over pairs. By hand, FSDP2 gathers the same
blocks.

Norms: one `learnables.statistics` of 96 sharded parameters, without histograms as the peer has none
and with, beside `full_tensor().item()` of each.

    python benchmarks/launch.py [--pairs 200] [--device cuda]  # three minutes on two cores
    python benchmarks/launch.py --table                        # write the file into the docs pages
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from environment import RESULTS, save, where, write_tables
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import learnables as ln
from learnables.launch import leave
from learnables.nn.comparison import interval

WIDTH, BLOCKS, BATCH = 256, 6, 256
SMALL = 16  # width of the 96 parameters whose norms are taken


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, width: int = WIDTH, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(ln.param_groups(model, lr=1e-3, weight_decay=0.05))


def by_hand(strategy: str, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    model: nn.Module = Net().to(device)
    if strategy == "ddp":
        place = [device.index] if device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=place)
    else:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return model, adam(model)


def looping(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def seconds(task: Callable[[], object], device: torch.device) -> float:
    """Wall time on the slowest rank, from a moment at which all are ready."""
    dist.barrier()
    start = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize()
    spent = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=device)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return spent.item()


def pairs_of(
    plain: Callable[[], object], ours: Callable[[], object], pairs: int, device: torch.device
) -> list[tuple[float, float]]:
    """(plain, ours) of each pair; who goes first changes from pair to pair."""
    found = []
    for number in range(pairs + 2):
        if number % 2:
            a, b = seconds(plain, device), seconds(ours, device)
        else:
            b, a = seconds(ours, device), seconds(plain, device)
        found.append((a, b))
    return found[2:]  # the first two warm up


def overhead(strategy: str, pairs: int, device: torch.device) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, WIDTH, device=device)
    plain = looping(*by_hand(strategy, device), x)
    torch.manual_seed(0)
    model, optimizer, _ = ln.prepare(Net().to(device), adam, strategy)
    return pairs_of(plain, looping(model, optimizer, x), pairs, device)


def norms(pairs: int, device: torch.device, histogram: bool) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    model, *_ = ln.prepare(Net(SMALL, 24).to(device), adam, "fsdp2")
    params = list(model.parameters())
    assert len(params) == 96

    def one_by_one() -> list[float]:
        return [p.norm().full_tensor().item() for p in params]

    def packed() -> list[float]:
        return ln.statistics(params, histogram=histogram).norm().tolist()

    for a, b in zip(one_by_one(), packed(), strict=True):
        assert abs(a - b) <= 1e-5 * a
    return pairs_of(one_by_one, packed, pairs, device)


def worker(rank: int, folder: str, pairs: int, kind: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
    )
    found: dict[str, Any] = {s: overhead(s, pairs, device) for s in ("ddp", "fsdp2")}
    found["norms"] = norms(pairs, device, histogram=False)
    found["norms, with histograms"] = norms(pairs, device, histogram=True)
    if rank == 0:
        torch.save(found, Path(folder, "found.pt"))
    leave()


WORDS = {
    "en": {
        "head": "| | ratio | 95 % | pairs |",
        "step": "a step after `prepare` ÷ the same step wrapped by hand, {name}",
        "norms": "norms of 96 sharded parameters, `full_tensor().item()` of each ÷ `ln.statistics`",
        "norms, with histograms": "the same ÷ all statistics, with their histograms",
        "where": "Two processes over gloo ",
    },
    "zh": {
        "head": "| | 比值 | 95 % | 对数 |",
        "step": "`prepare` 之后的一步 ÷ 手工包装的同一步，{name}",
        "norms": "96 个分片参数的范数：逐个 `full_tensor().item()` ÷ `ln.statistics`",
        "norms, with histograms": "同上 ÷ 全部统计量，含直方图",
        "where": "两个进程，gloo",
    },
}


def table(language: str) -> str:
    told = json.loads((RESULTS / "launch.json").read_text())
    words, lines = WORDS[language], []
    for key, row in told["rows"].items():
        packed = "times as fast" in row
        name = words[key] if packed else words["step"].format(name=key.split(", ")[1])
        ratio = row["times as fast"] if packed else row["ratio"]
        digits = 1 if packed else 3
        low, high = row["low 95 %"], row["high 95 %"]
        lines.append(
            f"| {name} | {ratio:.{digits}f} | {low:.{digits}f}–{high:.{digits}f} | {row['pairs']} |"
        )
    here = words["where"] + where(told["environment"], language)
    return "\n".join(["", words["head"], "|---|---|---|---|", *lines, "", here, ""])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true", help="write the tables, measure nothing")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    wanted = parser.parse_args()
    if wanted.table:
        write_tables("many-processes", "launch", table)
        return
    torch.set_num_threads(1)  # as the workers do, for the record
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder, wanted.pairs, wanted.device), nprocs=2)
        found = torch.load(f"{folder}/found.pt", weights_only=True)
    rows: dict[str, Any] = {}
    for name in ("ddp", "fsdp2"):
        ratios = [ours / plain for plain, ours in found[name]]
        low, high = interval(ratios, draws=4000)
        step = statistics.median(plain for plain, _ in found[name])
        rows[f"prepare, {name}"] = {
            "plain step, s": step,
            "ratio": statistics.median(ratios),
            "low 95 %": low,
            "high 95 %": high,
            "pairs": len(ratios),
        }
        print(
            f"prepare, {name:6} × {statistics.median(ratios):.3f} of a plain step of "
            f"{step * 1e3:.1f} ms; 95 %: {low:.3f} to {high:.3f}, {len(ratios)} pairs"
        )
    for name in ("norms", "norms, with histograms"):
        ratios = [naive / packed for naive, packed in found[name]]
        low, high = interval(ratios, draws=4000)
        rows[name] = {
            "one by one, s": statistics.median(naive for naive, _ in found[name]),
            "packed, s": statistics.median(packed for _, packed in found[name]),
            "times as fast": statistics.median(ratios),
            "low 95 %": low,
            "high 95 %": high,
            "pairs": len(ratios),
        }
        print(
            f"{name} of 96 sharded parameters: {statistics.median(ratios):.1f} times as fast "
            f"packed; 95 %: {low:.1f} to {high:.1f}"
        )
    name = "launch" if wanted.device == "cpu" else f"launch_{wanted.device}"
    print(save(name, rows, processes=2, device=wanted.device, width=WIDTH, blocks=BLOCKS))


if __name__ == "__main__":
    main()
