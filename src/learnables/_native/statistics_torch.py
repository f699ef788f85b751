"""The twin of statistics.c in torch's own operations: every dtype, every device, no compiler."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 512
_MANY = 1 << 15
_CHUNK = 1 << 18  # small enough for the cache, large enough to hide what a call of torch costs


def run(
    tensors: Sequence[Tensor], histogram: bool, *, quick: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Look at contiguous real tensors of one device: on the CPU a cacheful at a time.

    Elsewhere whole tensors at a time, and nothing waits for the device.

    Args:
        tensors: What to look at; at least one.
        histogram: Whether to fill the third result.
        quick: Leave the sums and zeros of CPU tensors undefined, for half of the time.

    Returns:
        As ``statistics.run``: moments ``(5, rows)``, integers ``(2, rows)`` and the histogram
        ``(rows, 512)`` or None.
    """
    device = tensors[0].device
    rows = len(tensors)
    bins = torch.zeros(rows, BINS, dtype=torch.int64, device=device) if histogram else None
    if device.type != "cpu":
        looked = [
            _look_at_once(x, None if bins is None else bins[i]) for i, x in enumerate(tensors)
        ]
        moments = torch.stack([torch.stack(seen[:5]) for seen in looked], dim=1)
        integers = torch.stack([torch.stack(seen[5:]) for seen in looked], dim=1)
        return moments, integers, bins
    scratch = torch.empty(min(_CHUNK, max(x.numel() for x in tensors)))
    seen = []
    for i, x in enumerate(tensors):
        into = None if bins is None else bins[i]
        parts = torch.split(x.view(-1), _CHUNK) if x.numel() else ()
        seen.append(_merged([_look(part, into, scratch, quick=quick) for part in parts]))
    numbers = torch.tensor(seen, dtype=torch.float64).T
    return numbers[:5].contiguous(), numbers[5:].long(), bins


def _merged(parts: list[tuple[float, float, float, float, int, int]]) -> tuple[float, ...]:
    """A row of the results: sum, sum of squares, absmax, min, max, zeros, non-finite."""
    if not parts:
        return 0.0, 0.0, 0.0, math.inf, -math.inf, 0, 0
    totals, squares, lows, highs, zeros, nonfinite = zip(*parts, strict=True)
    low, high = min(lows) + 0.0, max(highs) + 0.0  # no -0.0
    absmax = max(high, -low, 0.0)
    return sum(totals), sum(squares), absmax, low, high, sum(zeros), sum(nonfinite)


def _look(
    x: Tensor, bins: Tensor | None, scratch: Tensor, *, quick: bool = False
) -> tuple[float, float, float, float, int, int]:
    """Sum, sum of squares, min, max, zeros and non-finite of a CPU chunk; counts into ``bins``.

    Many float32 numbers are added in float32, which torch does pairwise and so loses about 1e-7;
    all else is added in float64. ``scratch``, as long as a chunk, saves asking for fresh memory,
    which costs more than the arithmetic.
    """
    x = x.to(wide(x.dtype))
    low, high = _range(x)
    counts = None
    if bins is not None:
        counts = _bins_of(x, scratch.view(torch.int32)).bincount(minlength=BINS)
        bins += counts
    # False where one is NaN; squares in this range do not overflow, nor do all of them vanish.
    ordinary = 1e-10 < max(high, -low) < 1e15
    if not ordinary or x.dtype is not torch.float32 or (x.numel() < _MANY and not quick):
        return _look_closely(x)
    if quick and x.numel() % 512 == 0:  # torch adds what it squares in a row: blocks keep it good
        norms = torch.linalg.vector_norm(x.view(-1, 512), dim=1).double()
        return 0.0, norms.dot(norms).item(), low, high, 0, 0
    squares = torch.mul(x, x, out=scratch[: x.numel()])
    sum_of_squares = squares.sum().item()
    if quick:
        return 0.0, sum_of_squares, low, high, 0, 0
    zeros = 0
    if low <= 0 <= high and (
        counts[0] + counts[256] if counts is not None else squares.amin() == 0
    ):
        zeros = x.numel() - int(x.count_nonzero())
    return x.sum().item(), sum_of_squares, low, high, zeros, 0


def _look_closely(x: Tensor) -> tuple[float, float, float, float, int, int]:
    """The same in float64, past what is not finite."""
    kept = x[x.isfinite()]
    nonfinite = x.numel() - kept.numel()
    if not kept.numel():
        return 0.0, 0.0, math.inf, -math.inf, 0, nonfinite
    exact = kept.double()
    zeros = kept.numel() - int(kept.count_nonzero())
    return exact.sum().item(), exact.dot(exact).item(), *_range(kept), zeros, nonfinite


def _range(x: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(x)
    return low.item(), high.item()


def _look_at_once(x: Tensor, bins: Tensor | None) -> tuple[Tensor, ...]:
    """The seven numbers of a whole tensor as 0-dimensional tensors; nothing waits for them."""
    x = x.to(wide(x.dtype))
    if bins is not None:
        bins.scatter_add_(0, _bins_of(x).long(), torch.ones_like(x, dtype=torch.int64))
    finite = x.isfinite()
    exact = torch.where(finite, x, 0).double()
    low = _reduced(torch.where(finite, x, math.inf), math.inf).double()
    high = -_reduced(torch.where(finite, -x, math.inf), math.inf).double()
    absmax = torch.maximum(high, -low).clamp(min=0)
    zeros, nonfinite = (x == 0).sum(), (~finite).sum()
    return exact.sum(), exact.square().sum(), absmax, low + 0.0, high + 0.0, zeros, nonfinite


def _reduced(x: Tensor, initial: float) -> Tensor:
    return torch.cat([x, x.new_full((1,), initial)]).amin()


def wide(dtype: torch.dtype) -> torch.dtype:
    """Where all values of ``dtype`` are exact (int64 beyond 2^53 apart)."""
    narrow = dtype.itemsize <= 2 or dtype is torch.float32
    return torch.float32 if narrow else torch.float64


def _bins_of(x: Tensor, keys: Tensor | None = None) -> Tensor:
    """Bin of each float32 or float64, from its bits: sign, and exponent brought into 0..255."""
    if x.dtype is torch.float32:
        out = None if keys is None else keys[: x.numel()]
        return torch.bitwise_right_shift(x.view(torch.int32), 23, out=out).bitwise_and_(511)
    bits = x.view(torch.int64)
    exponent = (bits >> 52).bitwise_and_(0x7FF).sub_(1023 - 127).clamp_(0, 255)
    return exponent.add_(bits < 0, alpha=256)
