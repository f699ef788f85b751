"""What a block-sparse linear layer costs, forward and backward, beside a dense one and the peers.

python benchmarks/sparse.py [--quick] [--only PART]

One thread, process CPU time, every task in turns with the dense layer of the same size. "Ideal" is
density x the time of that dense layer; gradients go to the input and to the stored values. Prints
the tables and writes results/sparse.json. ``--quick`` leaves out 4096 x 4096; ``--only`` runs one
of: grid, peers, blocks, half, batch, break_even, memory.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from environment import Timing, paired, save
from torch import Tensor, nn
from torch.nn import functional as F

import learnables as ln
from learnables.sparse.kernels import FORCE

QUICK = "--quick" in sys.argv
SIZES = (1024,) if QUICK else (1024, 4096)
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


def grid() -> list[dict[str, Any]]:
    rows = []
    for size in SIZES:
        for density in DENSITIES:
            row = against_dense(size, 64, density, 4 if size == 1024 else 12)
            rows.append({"size": size, "block": 64, **row})
            show(rows[-1])
    return rows


def blocks() -> list[dict[str, Any]]:
    rows = []
    for block in (8, 16, 32, 128):
        for density in (0.1, 0.2, 0.5) if block in (32, 128) else (0.2,):
            rows.append({"size": 1024, "block": block, **against_dense(1024, block, density, 3)})
            show(rows[-1])
    return rows


def half() -> list[dict[str, Any]]:
    rows = []
    for size in SIZES:
        for density in DENSITIES:
            row = against_dense(size, 64, density, 3, dtype=torch.bfloat16)
            rows.append({"size": size, "block": 64, "dtype": "bfloat16", **row})
            show(rows[-1])
    return rows


def batch() -> list[dict[str, Any]]:
    rows = []
    for samples in (1, 8, 64, 512, 8192):
        row = against_dense(1024, 64, 0.2, 3, batch=samples)
        rows.append({"size": 1024, "block": 64, "batch": samples, **row})
        show(rows[-1])
    return rows


def break_even() -> list[dict[str, Any]]:
    rows = []
    for size, density in [(s, d) for s in SIZES for d in (0.7, 0.8, 0.9, 1.0)]:
        row = against_dense(size, 64, density, 3 if size == 1024 else 8)
        rows.append({"size": size, "block": 64, **row})
        show(rows[-1])
    return rows


def peers() -> list[dict[str, Any]]:
    """What else one can do with the same mask in torch today."""
    rows = []
    for size in SIZES:
        for density in DENSITIES:
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


def memory() -> list[dict[str, Any]]:
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


def main() -> None:
    torch.set_num_threads(1)
    chosen = [sys.argv[sys.argv.index("--only") + 1]] if "--only" in sys.argv else list(PARTS)
    rows = {}
    for name in chosen:
        print(f"\n{name}")
        rows[name] = PARTS[name]()
    if chosen == list(PARTS):
        save("sparse", rows, backend=ln.sparse.backend()._asdict())


if __name__ == "__main__":
    main()
