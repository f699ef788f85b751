"""What one look at all parameters and gradients costs, in reads of the same memory.

python benchmarks/stats.py [--quick]

The floor is ``torch.sum`` over one flat buffer of the same bytes, in the same rounds, one thread,
process CPU time. Prints the table, writes results/stats.json and puts the table into the pages
docs/*/statistics.md. ``--quick`` leaves out ViT-B and writes nothing.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from environment import Timing, kernel, paired, save, write_tables
from torch import Tensor

from learnables.stats import FORCE, backend, magnitudes, statistics

TARGETS = {  # in reads of the memory, for ViT-B
    "native, with histogram": 4.0,
    "native, without histogram": 1.4,
    "torch, with histogram": 12.0,
    "torch, without histogram": 6.0,
    "torch, magnitudes only": 3.0,
}


def vit_shapes(dim: int, depth: int = 12, classes: int = 1000) -> list[tuple[int, ...]]:
    """The 152 parameters of a Vision Transformer on 224 x 224 pixels in patches of 16."""
    block = [(dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,), (dim,), (dim,)]
    block += [(4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    ends = [(1, 1, dim), (1, 197, dim), (dim, 3, 16, 16), (dim,)]
    return [*ends, *block * depth, (dim,), (dim,), (classes, dim), (classes,)]


def forced(name: str, look: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        os.environ[FORCE] = name
        look()
        del os.environ[FORCE]

    return run


def wandb_recipe(tensors: list[Tensor]) -> None:
    """What wandb.watch does to each tensor: finite? minimum, maximum, 64 bins, lists."""
    for x in tensors:
        flat = x.reshape(-1)
        if not torch.isfinite(flat).all():
            flat = flat[torch.isfinite(flat)]
        low, high = flat.min().item(), flat.max().item()
        torch.histc(flat, bins=64, min=low, max=high).tolist()
        torch.linspace(low, high, steps=65).tolist()


def tensorboard() -> Callable[[list[Tensor]], object]:
    """What the article ends with: ``add_histogram`` of each tensor."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tempfile.mkdtemp())

    def add_all(tensors: list[Tensor]) -> None:
        for i, x in enumerate(tensors):
            writer.add_histogram(str(i), x, 0)

    return add_all


def measure(name: str, dim: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    shapes = vit_shapes(dim)
    tensors = [torch.randn(s) * 0.02 for s in shapes] + [torch.randn(s) * 1e-3 for s in shapes]
    flat = torch.cat([x.reshape(-1) for x in tensors])
    add_histograms = tensorboard()
    tasks: dict[str, Callable[[], object]] = {
        "native, with histogram": forced("native", lambda: statistics(tensors)),
        "native, without histogram": forced("native", lambda: statistics(tensors, histogram=False)),
        "torch, with histogram": forced("torch", lambda: statistics(tensors)),
        "torch, without histogram": forced("torch", lambda: statistics(tensors, histogram=False)),
        "torch, magnitudes only": forced("torch", lambda: magnitudes(tensors)),
        "peer: torch._foreach_norm": lambda: torch._foreach_norm(tensors),
        "peer: aminmax loop": lambda: [torch.aminmax(x) for x in tensors],
        "peer: norm, aminmax, mean, std loop": lambda: [
            (x.norm(), torch.aminmax(x), x.mean(), x.std()) for x in tensors
        ],
        "peer: wandb.watch recipe": lambda: wandb_recipe(tensors),
        "peer: TensorBoard add_histogram": lambda: add_histograms(tensors),
    }
    if backend(tensors[0]).name != "native":
        print(f"no native kernel: {backend(tensors[0]).why}")
        tasks = {k: v for k, v in tasks.items() if not k.startswith("native")}
    timings = paired(lambda: flat.sum(), tasks, rounds=rounds, seconds=8.0)
    show(name, tensors, timings)
    rows: dict[str, Any] = {"model": name, "tensors": len(tensors), "values": flat.numel()}
    rows["timings"] = timings
    if "native, with histogram" in tasks:
        rows["two_threads"] = two_threads(tensors, rounds)
    return rows


def two_threads(tensors: list[Tensor], rounds: int) -> Timing:
    """Wall clock of one thread over that of two; means something on two free cores only."""
    timing = paired(
        lambda: statistics(tensors, threads=2),
        {"one": lambda: statistics(tensors, threads=1)},
        rounds=rounds,
        clock=time.perf_counter,
    )["one"]
    print(f"  two threads, with histogram: {timing.ratio:.2f} times as fast as one (wall clock)")
    return timing


def show(name: str, tensors: list[Tensor], timings: dict[str, Timing]) -> None:
    size = sum(x.numel() for x in tensors)
    print(f"\n{name}: parameters and gradients, {len(tensors)} tensors, {size / 1e6:.1f} M values")
    print(f"  {'':38} {'ms':>8} {'x floor':>8} {'quartiles':>13} {'best':>7} {'wanted':>7}")
    for label, t in timings.items():
        wanted = f"{TARGETS[label]:.1f}" if label in TARGETS else ""
        spread = f"{t.low:.2f}-{t.high:.2f}"
        print(
            f"  {label:38} {1e3 * t.median:8.2f} {t.ratio:8.2f} {spread:>13} "
            f"{t.best_ratio:7.2f} {wanted:>7}"
        )


def table(rows: list[dict[str, Any]]) -> list[str]:
    head = [row["model"] for row in rows]
    lines = [f"| | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for label in rows[0]["timings"]:
        cells = (row["timings"][label] for row in rows)
        lines.append(f"| {label} | {' | '.join(f'{t.ratio:.1f}' for t in cells)} |")
    return lines


def main() -> None:
    torch.set_num_threads(1)
    models = {"ViT-Tiny": 192} if "--quick" in sys.argv else {"ViT-Tiny": 192, "ViT-B": 768}
    rows = [measure(name, dim, rounds=21) for name, dim in models.items()]
    if "--quick" not in sys.argv:
        write_tables("statistics", "stats", lambda _: "\n".join(table(rows)))
        save("stats", rows, backend=kernel(backend()), wanted_for_vit_b=TARGETS)


if __name__ == "__main__":
    main()
