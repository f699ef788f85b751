"""Which kind of linear layer pays on this machine: measured, not promised.

`learnables bench sparse` prints it.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from learnables.nn.block_sparse_linear import BlockSparseLinear
from learnables.nn.dynamic_linear import DynamicLinear
from learnables.sparse.kernels import backend


@final
@dataclass(frozen=True)
class Row:
    """One layer, forward and backward, beside a dense one of the same sizes.

    Attributes:
        layer: What it is.
        values: Its share of the dense layer's number of weights.
        time: Its time over the dense layer's; median of the ratios of paired runs.
        milliseconds: Median time of one forward and backward pass.
    """

    layer: str
    values: float
    time: float
    milliseconds: float


@final
@dataclass(frozen=True)
class Comparison:
    """What `compare` measured; prints as a table with advice below it.

    Attributes:
        rows: The dense layer, then block-sparse, low-rank and dynamic ones.
        break_even: Largest measured density at which block-sparse is quicker than dense; 0 if none.
        setting: Sizes, dtype, device, threads and backend.
    """

    rows: tuple[Row, ...]
    break_even: float
    setting: str

    def __str__(self) -> str:
        lines = [self.setting, "", f"{'layer':34s} {'values':>8s} {'time':>8s} {'ms':>9s}"]
        lines += [
            f"{row.layer:34s} {row.values:7.1%} {row.time:7.2f}x {row.milliseconds:9.2f}"
            for row in self.rows
        ]
        return "\n".join([*lines, "", *self.advice])

    @property
    def advice(self) -> tuple[str, ...]:
        """What follows from the numbers, in sentences."""
        if not self.break_even:
            sparse = "Block-sparse saves memory here, but no time at any density measured."
        else:
            sparse = f"Block-sparse is quicker than dense up to density {self.break_even:.2g}."
        pairs = [
            (row, low)
            for row in self.rows
            for low in self.rows
            if row.layer.startswith("block-sparse")
            and low.layer.startswith("low rank")
            and abs(row.values - low.values) < 0.02
        ]
        wins = sum(low.time < row.time for row, low in pairs)
        return (
            sparse,
            f"Low rank with as many values is quicker in {wins} of {len(pairs)} cases; it cannot "
            "reach full rank, which block-sparse can.",
            "A dynamic layer is for weights that depend on an input: compare its time with that of "
            "a dense layer, not its number of values.",
        )


def compare(
    in_features: int = 1024,
    out_features: int = 1024,
    batch: int = 512,
    *,
    block: int = 64,
    densities: Sequence[float] = (0.05, 0.1, 0.2, 0.5, 0.8, 1.0),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seconds: float = 1.0,
) -> Comparison:
    """Forward and backward of dense, block-sparse, low-rank and dynamic layers on this machine.

    Each layer takes turns with the dense one, so that noise hits both alike.

    Args:
        in_features: I.
        out_features: O.
        batch: Samples.
        block: Side of a block.
        densities: Of the block-sparse layers; a low-rank one with as many values beside each.
        dtype: Of weights and inputs.
        device: Where to measure.
        seconds: About how long to measure each layer.

    Raises:
        LayoutError: A block larger than the layer, or a density outside (0, 1].

    Example:
        >>> found = compare(64, 64, 8, block=16, densities=(0.25,), seconds=0.01)
        >>> [row.layer for row in found.rows][:3]
        ['dense', 'block-sparse, density 0.25', 'low rank, rank 8']
    """
    made = {"dtype": dtype, "device": torch.device(device)}
    x = torch.randn(batch, in_features, requires_grad=True, **made)  # type: ignore[call-overload]
    g = torch.randn(batch, out_features, **made)  # type: ignore[call-overload]
    condition = torch.randn(batch, 64, **made)  # type: ignore[call-overload]
    dense = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device=device)
    whole = dense.weight.numel()
    layers: dict[str, nn.Module] = {}
    for density in densities:
        sparse = BlockSparseLinear(
            in_features, out_features, block, density, bias=False, dtype=dtype, device=device
        )
        layers[f"block-sparse, density {sparse.density:.3g}"] = sparse
        rank = round(sparse.weight.numel() / (in_features + out_features))
        if 0 < rank < min(in_features, out_features) / 2:
            layers[f"low rank, rank {rank}"] = nn.Sequential(
                nn.Linear(in_features, rank, bias=False, dtype=dtype, device=device),
                nn.Linear(rank, out_features, bias=False, dtype=dtype, device=device),
            )
    sizes, same = (in_features, out_features, 64), {"bias": False, **made}
    layers["dynamic, 8 bases"] = DynamicLinear(*sizes, kind="basis", **same)  # type: ignore[arg-type]
    layers["dynamic, rank 8"] = DynamicLinear(*sizes, kind="low_rank", **same)  # type: ignore[arg-type]
    rows, baselines = [], []
    for name, layer in layers.items():
        inputs = (x, condition) if isinstance(layer, DynamicLinear) else (x,)
        pairs = paired(_pass(dense, (x,), g), _pass(layer, inputs, g), x.device, seconds)
        baselines += [base for base, _ in pairs]
        values = sum(p.numel() for p in layer.parameters()) / whole
        rows.append(
            Row(
                name,
                values,
                statistics.median(own / base for base, own in pairs),
                1e3 * statistics.median(own for _, own in pairs),
            )
        )
    first = Row("dense", 1.0, 1.0, 1e3 * statistics.median(baselines))
    quick = [row.values for row in rows if row.layer.startswith("block-sparse") and row.time < 1]
    setting = (
        f"{in_features} -> {out_features}, batch {batch}, block {block}, {dtype} on {device}, "
        f"{torch.get_num_threads()} threads; block-sparse by {backend(x).name}"
    )
    return Comparison((first, *rows), max(quick, default=0.0), setting)


def _pass(layer: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> Callable[[], None]:
    def run() -> None:
        inputs[0].grad = None
        layer.zero_grad()
        layer(*inputs).backward(g)

    return run


def paired(
    base: Callable[[], object], own: Callable[[], object], device: torch.device, seconds: float
) -> list[tuple[float, float]]:
    """Seconds of both, in turns: three pairs at least, then until the time is up.

    Who goes first changes from pair to pair, since the first one warms what the second uses.
    """
    single = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if single else time.perf_counter

    def timed(task: Callable[[], object]) -> float:
        start = clock()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    timed(base), timed(own)
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < 3 or (time.perf_counter() < end and len(pairs) < 200):
        if len(pairs) % 2:
            second = timed(own)
            pairs.append((timed(base), second))
        else:
            pairs.append((timed(base), timed(own)))
    return pairs


def interval(ratios: Sequence[float], draws: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the median; the same for the same ratios."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[round(0.025 * draws)], medians[round(0.975 * draws) - 1]
