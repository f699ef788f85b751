"""Whether a memory layout matters for a shape on this machine: measured, with the noise beside it.

`learnables bench layout` prints it.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learnables.nn.comparison import interval, paired

_LEAST = 0.02  # a difference below it is not worth a layout, however sure it is


@final
@dataclass(frozen=True)
class Ratio:
    """How many times as long as the baseline; median over paired runs.

    Attributes:
        median: Of the ratios of the pairs.
        low: Lower end of the 95 % bootstrap interval of that median.
        high: Upper end.
        pairs: How many.
    """

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:5.2f} ({self.low:.2f} to {self.high:.2f})"

    def differs(self, noise: float) -> bool:
        """Whether the whole interval lies outside of 1 ± noise, on the same side."""
        return self.low > 1 + noise or self.high < 1 / (1 + noise)


@final
@dataclass(frozen=True)
class LayoutRow:
    """One layout beside the row-major one.

    Attributes:
        layout: What it is.
        forward: Time of a forward pass without gradients.
        training: Time of a forward and a backward pass.
    """

    layout: str
    forward: Ratio
    training: Ratio


@final
@dataclass(frozen=True)
class LayoutComparison:
    """What `compare_layouts` measured; prints as a table with a verdict below it.

    Attributes:
        rows: The row-major layout against itself first, then the others.
        setting: Sizes, dtype, device and threads.
    """

    rows: tuple[LayoutRow, ...]
    setting: str

    @property
    def noise(self) -> tuple[float, float]:
        """How far the row-major layout seems from itself, in forward and in training; ≥ 0.02."""
        same = self.rows[0]
        return _noise(same.forward), _noise(same.training)

    @property
    def advice(self) -> tuple[str, ...]:
        """What follows from the numbers, in sentences; only what is larger than the noise."""
        forward, training = self.noise
        said = [
            f"{row.layout}: {ratio.median:.2f} times as long in {kind}."
            for row in self.rows[1:]
            for kind, ratio, noise in (
                ("forward", row.forward, forward),
                ("training", row.training, training),
            )
            if ratio.differs(noise)
        ]
        if not said:
            return (
                "No layout differs from the row-major one by more than the noise "
                f"({forward:.0%} forward, {training:.0%} training): leave it row-major.",
            )
        rest = "Differences below the noise"
        return (*said, f"{rest} ({forward:.0%} forward, {training:.0%} training) are not named.")

    def __str__(self) -> str:
        head = f"{'times as long as row-major (95 %)':42s} {'forward':>22s} {'training':>22s}"
        lines = [self.setting, "", head]
        lines += [f"{r.layout:42s} {r.forward!s:>22s} {r.training!s:>22s}" for r in self.rows]
        return "\n".join([*lines, "", *self.advice])


def compare_layouts(
    in_features: int = 1024,
    out_features: int = 1024,
    batch: int = 512,
    *,
    kernel: int | None = None,
    side: int = 32,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seconds: float = 1.0,
) -> LayoutComparison:
    """Time one product with its weight in several layouts, each in turns with the row-major one.

    The first row is the row-major layout against a copy of itself: what it shows is noise, and no
    smaller difference is called one.

    Args:
        in_features: I, or the channels of the images.
        out_features: O, likewise.
        batch: Rows of x, or images.
        kernel: None for a matrix; the side K of a convolution's kernel for ``conv2d``.
        side: Height and width of the images, with ``kernel``.
        dtype: Of weights and inputs.
        device: Where to measure.
        seconds: About how long to measure each layout, forward and training each.

    Returns:
        The table.

    Example:
        >>> found = compare_layouts(32, 32, 8, seconds=0.01)
        >>> [row.layout for row in found.rows]  # doctest: +NORMALIZE_WHITESPACE
        ['F.linear, row-major: itself again', 'F.linear, column-major',
         'x @ weight, row-major', 'x @ weight, column-major']

    Cost:
        Twice ``seconds`` for each row.
    """
    where = torch.device(device)
    random_ = partial(torch.randn, dtype=dtype, device=where)
    if kernel is None:
        w, x = random_(out_features, in_features), random_(batch, in_features)
        g = random_(batch, out_features)
        tasks = _of_a_matrix(w, x)
        sizes = f"{in_features} -> {out_features}, batch {batch}"
    else:
        w = random_(out_features, in_features, kernel, kernel)
        x = random_(batch, in_features, side, side)
        g = random_(batch, out_features, side - kernel + 1, side - kernel + 1)
        tasks = _of_a_kernel(w, x)
        sizes = (
            f"{in_features} -> {out_features} channels, kernel {kernel} x {kernel}, "
            f"{batch} images of {side} x {side}"
        )
    (base_name, base), *others = tasks.items()
    rows = [
        LayoutRow(
            name,
            *(
                _ratio(paired(_task(*base, g, train), _task(*task, g, train), where, seconds))
                for train in (False, True)
            ),
        )
        for name, task in ((f"{base_name}: itself again", _again(base)), *others)
    ]
    setting = f"{sizes}, {dtype} on {where}, {torch.get_num_threads()} threads"
    return LayoutComparison(tuple(rows), setting)


_Product = Callable[[Tensor, Tensor], Tensor]
_Task = tuple[_Product, nn.Parameter, Tensor]


def _of_a_matrix(w: Tensor, x: Tensor) -> Mapping[str, _Task]:
    column, turned = w.t().contiguous().t(), w.t()  # (O, I) and (I, O), both column-major
    return {
        "F.linear, row-major": (F.linear, nn.Parameter(w), x),
        "F.linear, column-major": (F.linear, nn.Parameter(column), x),
        "x @ weight, row-major": (torch.matmul, nn.Parameter(turned.contiguous()), x),
        "x @ weight, column-major": (torch.matmul, nn.Parameter(turned), x),
    }


def _of_a_kernel(w: Tensor, x: Tensor) -> Mapping[str, _Task]:
    last = torch.channels_last
    w_last, x_last = w.contiguous(memory_format=last), x.contiguous(memory_format=last)
    return {
        "conv2d, row-major": (F.conv2d, nn.Parameter(w), x),
        "conv2d, weight channels last": (F.conv2d, nn.Parameter(w_last), x),
        "conv2d, images channels last": (F.conv2d, nn.Parameter(w), x_last),
        "conv2d, both channels last": (F.conv2d, nn.Parameter(w_last), x_last),
    }


def _again(task: _Task) -> _Task:
    product, w, x = task
    return product, nn.Parameter(w.detach().clone()), x


def _task(
    product: _Product, w: nn.Parameter, x: Tensor, g: Tensor, train: bool
) -> Callable[[], object]:
    if not train:
        return torch.no_grad()(lambda: product(x, w))
    x = x.detach().requires_grad_()

    def forward_and_backward() -> None:
        w.grad = x.grad = None
        y = product(x, w)
        y.backward(g)  # type: ignore[no-untyped-call]

    return forward_and_backward


def _ratio(pairs: Sequence[tuple[float, float]]) -> Ratio:
    ratios = [own / base for base, own in pairs]
    return Ratio(statistics.median(ratios), *interval(ratios), len(ratios))


def _noise(same: Ratio) -> float:
    return max(_LEAST, math.exp(max(abs(math.log(same.low)), abs(math.log(same.high)))) - 1)
