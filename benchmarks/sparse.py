"""What a block-sparse linear layer costs, forward and backward, beside a dense one and the peers.

    python benchmarks/sparse.py                # all parts, about ten minutes on one core
    python benchmarks/sparse.py --only grid    # one part, three minutes at most; the others stay
    python benchmarks/sparse.py --quick        # a dry run without 4096 x 4096, which writes nothing
    python benchmarks/sparse.py --table        # write what the file says into the docs pages

One thread, process CPU time, every task in turns with the dense layer of the same size. "Ideal" is
density x the time of that dense layer; gradients go to the input and to the stored values. Writes
results/sparse.json, each part with the machine it was measured on.
"""

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from environment import Timing, bar, kernel, paired, parts, save_part, where, write_tables
from torch import Tensor, nn
from torch.nn import functional as F

import learnables as ln
from learnables.sparse.kernels import FORCE

Rows = list[dict[str, Any]]
SIZES = [1024, 4096]
DENSITIES = (0.1, 0.2, 0.5)
BATCH = 512


def forced(backend: str, task: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        os.environ[FORCE] = backend
        try:
            task()
        finally:
            del os.environ[FORCE]

    return run


def training(layer: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, leaves: list[Tensor]):
    def run() -> None:
        x.grad = None
        for leaf in leaves:
            leaf.grad = None
        layer(x).backward(g)

    return run


def inference(layer: Callable[[Tensor], Tensor], x: Tensor):
    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def setting(size: int, block: int, density: float, batch: int = BATCH, dtype=torch.float32):
    torch.manual_seed(0)
    made = {"bias": False, "dtype": dtype}
    layer = ln.nn.BlockSparseLinear(size, size, block=block, density=density, **made)
    dense = nn.Linear(size, size, **made)
    x = torch.randn(batch, size, dtype=dtype, requires_grad=True)
    return layer, dense, x, torch.randn(batch, size, dtype=dtype)


def ideal(timing: Timing, density: float) -> dict[str, float]:
    return {
        "x_ideal": timing.ratio / density,
        "x_ideal_low": timing.low / density,
        "x_ideal_high": timing.high / density,
        "x_ideal_best": timing.best_ratio / density,
        "x_dense": timing.ratio,
        "ms": 1e3 * timing.median,
    }


def against_dense(size: int, block: int, density: float, seconds: float, **more: Any):
    layer, dense, x, g = setting(size, block, density, **more)
    task = training(layer, x, g, [layer.weight])
    timings = paired(
        training(dense, x, g, [dense.weight]),
        {"native": forced("native", task), "torch": forced("torch", task)},
        rounds=11,
        seconds=seconds,
    )
    rows = {name: ideal(timings[name], layer.density) for name in ("native", "torch")}
    return {"density": layer.density, "dense_ms": 1e3 * timings["baseline"].median, **rows}


def grid() -> Rows:
    rows = []
    for size in SIZES:
        for density in DENSITIES:
            row = against_dense(size, 64, density, 4 if size == 1024 else 12)
            rows.append({"size": size, "block": 64, **row})
            show(rows[-1])
    return rows


def blocks() -> Rows:
    rows = []
    settings = [(1024, block, 0.2) for block in (8, 16)]
    settings += [(1024, block, density) for block in (32, 128) for density in DENSITIES]
    settings += [(size, 32, density) for size in SIZES[1:] for density in DENSITIES]
    for size, block, density in settings:
        row = against_dense(size, block, density, 3 if size == 1024 else 8)
        rows.append({"size": size, "block": block, **row})
        show(rows[-1])
    return rows


def half() -> Rows:
    rows = []
    for size in SIZES:
        for density in DENSITIES:
            row = against_dense(size, 64, density, 3, dtype=torch.bfloat16)
            rows.append({"size": size, "block": 64, "dtype": "bfloat16", **row})
            show(rows[-1])
    return rows


def batch() -> Rows:
    rows = []
    for samples in (1, 8, 64, 512, 8192):
        row = against_dense(1024, 64, 0.2, 3, batch=samples)
        rows.append({"size": 1024, "block": 64, "batch": samples, **row})
        show(rows[-1])
    return rows


def break_even() -> Rows:
    rows = []
    for size, density in [(s, d) for s in SIZES for d in (0.7, 0.8, 0.9, 1.0)]:
        row = against_dense(size, 64, density, 3 if size == 1024 else 8)
        rows.append({"size": size, "block": 64, **row})
        show(rows[-1])
    return rows


def peers() -> Rows:
    """What else one can do with the same mask in torch today."""
    rows = []
    for size in SIZES:
        for density in DENSITIES if size == 1024 else DENSITIES[:1]:
            layer, dense, x, g = setting(size, 64, density)
            whole = layer.dense().detach().requires_grad_()
            mask = (layer.dense() != 0).float().detach()
            grid = size // 64
            stored = torch.randn(grid, grid, 64, 64, requires_grad=True)
            values = layer.weight.detach().clone().requires_grad_()
            starts, columns = layer.row_starts, layer.columns
            still = x.detach()

            def by_mask(x, whole=whole, mask=mask):
                return F.linear(x, whole * mask)

            def as_the_article(x, stored=stored, size=size):
                return torch.matmul(x, stored.permute(0, 2, 1, 3).reshape(size, size))

            def by_bsr(x, values=values, starts=starts, columns=columns, size=size):
                matrix = torch.sparse_bsr_tensor(starts, columns, values, size=(size, size))
                return F.linear(x, matrix)

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # BSR is "in beta state"
                torch.testing.assert_close(by_bsr(still), layer(still))
                trained = paired(
                    training(dense, x, g, [dense.weight]),
                    {
                        "native": training(layer, x, g, [layer.weight]),
                        "masked dense": training(by_mask, x, g, [whole]),
                        "article 5.2": training(as_the_article, x, g, [stored]),
                        "torch BSR, no gradient to x": training(by_bsr, still, g, [values]),
                    },
                    rounds=7,
                    seconds=3 if size == 1024 else 10,
                )
                forward = paired(
                    inference(dense, x),
                    {"native": inference(layer, x), "torch BSR": inference(by_bsr, x)},
                    rounds=7,
                    seconds=3 if size == 1024 else 8,
                )
            found = {n: ideal(t, layer.density) for n, t in trained.items() if n != "baseline"}
            over = forward["torch BSR"].median / forward["native"].median
            rows.append(
                {
                    "size": size,
                    "block": 64,
                    "density": layer.density,
                    **found,
                    "forward_torch_bsr_over_native": over,
                }
            )
            show(rows[-1])
    return rows


def memory() -> Rows:
    """Bytes that live after three AdamW steps, counted; and the process's peak, measured."""
    rows = []
    for size in SIZES:
        for density in (0.1, 0.2):
            layer, dense, x, g = setting(size, 64, density)
            ours, theirs = (held(module, x, g) for module in (layer, dense))
            peaks = {name: peak(size, density, name) for name in ("sparse", "dense")}
            rows.append(
                {
                    "size": size,
                    "density": layer.density,
                    "state_x_ideal": ours / (layer.density * theirs),
                    "sparse_bytes": ours,
                    "dense_bytes": theirs,
                    "peak_sparse_MB": peaks["sparse"] / 1e6,
                    "peak_dense_MB": peaks["dense"] / 1e6,
                }
            )
            print(rows[-1])
    return rows


def held(module: nn.Module, x: Tensor, g: Tensor) -> int:
    """Bytes of parameters, buffers, gradients and AdamW's state, each storage once."""
    optimizer = torch.optim.AdamW(module.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        module(x).backward(g)
        optimizer.step()
    tensors = [*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters())]
    tensors += [v for state in optimizer.state.values() for v in state.values()]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak(size: int, density: float, what: str) -> int:
    """By how much a process of its own grows while it makes a layer and trains it three steps."""
    code = f"""
import re, torch
import learnables as ln
torch.set_num_threads(1)
x, g = torch.randn({BATCH}, {size}, requires_grad=True), torch.randn({BATCH}, {size})
make = {{"sparse": lambda size, d: ln.nn.BlockSparseLinear(size, size, density=d, bias=False),
        "dense": lambda size, d: torch.nn.Linear(size, size, bias=False)}}[{what!r}]
def train(layer):
    optimizer = torch.optim.AdamW(layer.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        layer(x[:, :layer.in_features]).backward(g[:, :layer.out_features])
        optimizer.step()
def memory(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
train(make(64, 1.0))  # what is loaded and cached on first use
x.grad = None
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
start = memory("VmRSS")
train(make({size}, {density}))
print(memory("VmHWM") - start)
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env, check=True
    )
    return int(done.stdout)


def show(row: dict[str, Any]) -> None:
    parts = []
    for name, value in row.items():
        if isinstance(value, dict):
            parts.append(f"{name} {value['x_ideal']:.2f} x ideal ({value['x_dense']:.3f} x dense)")
        else:
            parts.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    print(" | ".join(parts), flush=True)


PARTS = {f.__name__: f for f in (grid, blocks, half, batch, break_even, peers, memory)}

WORDS = {
    "en": {
        "matrix": "matrix",
        "block": "block",
        "dtype": "dtype",
        "batch": "batch",
        "density": "density",
        "dense": "dense",
        "native": "native",
        "torch": "plain torch",
        "masked dense": "masked dense",
        "article 5.2": "the article's 5.2",
        "torch BSR, no gradient to x": "torch BSR, no gradient to x",
        "forward": "forward, torch BSR over ours",
        "held": "parameters, gradients, AdamW",
        "held dense": "of the dense layer",
        "over": "over density × dense",
        "peak": "peak of a process: sparse, dense",
        "ideal": "Forward and backward, batch 512. Numbers are multiples of *ideal*, which is "
        "density × the time of the dense layer in the same rounds; dense in ms.",
        "batches": "The same by batch size, 1024 × 1024, block 64:",
        "even": "Near full density, time over that of the dense layer:",
        "peers": "What else there is in torch for the same mask, in multiples of ideal:",
        "memory": "Bytes that live after three AdamW steps, counted, and by how much the process "
        "grew at its peak, measured:",
    },
    "zh": {
        "matrix": "矩阵",
        "block": "块",
        "dtype": "类型",
        "batch": "批大小",
        "density": "密度",
        "dense": "稠密",
        "native": "原生",
        "torch": "纯 torch",
        "masked dense": "稠密加掩码",
        "article 5.2": "文章 5.2",
        "torch BSR, no gradient to x": "torch BSR，x 没有梯度",
        "forward": "前向，torch BSR 与我们之比",
        "held": "参数、梯度、AdamW",
        "held dense": "稠密层的",
        "over": "与 密度 × 稠密 之比",
        "peak": "进程峰值：稀疏，稠密",
        "ideal": "前向加反向，批大小 512。数字是*理想值*的倍数；"
        "理想值 = 密度 × 同一轮里稠密层的时间；稠密一列为毫秒。",
        "batches": "按批大小，1024 × 1024，块 64：",
        "even": "接近满密度时，与稠密层时间之比：",
        "peers": "同一掩码在 torch 里还有哪些做法，以理想值的倍数计：",
        "memory": "三步 AdamW 之后还在的字节数（清点所得），"
        "以及进程在峰值时增长了多少（测量所得）：",
    },
}


def table(language: str) -> str:
    """The parts of the result file as Markdown; a part that was not measured is left out."""
    found, word = parts("sparse"), WORDS[language]
    lines: list[str] = []

    def add(names: tuple[str, ...], title: str, columns: list[str], cells: Any) -> None:
        there = [name for name in names if name in found]
        if not there:
            return
        lines.extend([word[title], "", bar(word.get(c, c) for c in columns)])
        lines.append(bar("---" for _ in columns))
        lines.extend(bar(cells(row)) for name in there for row in found[name]["rows"])
        lines.extend(["", where(found[there[0]]["environment"], language), ""])

    add(
        ("grid", "blocks", "half"),
        "ideal",
        ["matrix", "block", "dtype", "density", "dense", "native", "torch"],
        lambda row: (
            f"{row['size']}²",
            row["block"],
            row.get("dtype", "float32"),
            f"{row['density']:.2f}",
            f"{row['dense_ms']:.1f} ms",
            f"{row['native']['x_ideal']:.2f}",
            f"{row['torch']['x_ideal']:.2f}",
        ),
    )
    add(
        ("batch",),
        "batches",
        ["batch", "density", "dense", "native", "torch"],
        lambda row: (
            row["batch"],
            f"{row['density']:.2f}",
            f"{row['dense_ms']:.2f} ms",
            f"{row['native']['x_ideal']:.2f}",
            f"{row['torch']['x_ideal']:.2f}",
        ),
    )
    add(
        ("break_even",),
        "even",
        ["matrix", "density", "native", "torch"],
        lambda row: (
            f"{row['size']}²",
            f"{row['density']:.2f}",
            f"{row['native']['x_dense']:.2f}",
            f"{row['torch']['x_dense']:.2f}",
        ),
    )
    others = ["native", "masked dense", "article 5.2", "torch BSR, no gradient to x"]
    add(
        ("peers",),
        "peers",
        ["matrix", "density", *others, "forward"],
        lambda row: (
            f"{row['size']}²",
            f"{row['density']:.2f}",
            *(f"{row[name]['x_ideal']:.2f}" for name in others),
            f"{row['forward_torch_bsr_over_native']:.0f} ×",
        ),
    )
    add(
        ("memory",),
        "memory",
        ["matrix", "density", "held", "held dense", "over", "peak"],
        lambda row: (
            f"{row['size']}²",
            f"{row['density']:.2f}",
            f"{row['sparse_bytes'] / 1e6:.2f} MB",
            f"{row['dense_bytes'] / 1e6:.2f} MB",
            f"{row['state_x_ideal']:.4f}",
            f"{row['peak_sparse_MB']:.1f} MB, {row['peak_dense_MB']:.1f} MB",
        ),
    )
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="1024 only; writes nothing")
    parser.add_argument("--table", action="store_true", help="write the docs pages")
    given = parser.parse_args()
    if given.table:
        write_tables("sparse", "sparse", table)
        return
    if given.quick:
        del SIZES[1:]
    torch.set_num_threads(1)
    for name in given.only:
        print(f"\n{name}")
        rows = PARTS[name]()
        if not given.quick:
            save_part("sparse", name, rows, backend=kernel(ln.sparse.backend()))


if __name__ == "__main__":
    main()
