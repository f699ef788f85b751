"""The twin of statistics.c in torch's own operations: every dtype, every device, no compiler."""

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

BINS = 512
_MANY = 1 << 15  # values; tensors with fewer are looked at together
_CHUNK = 1 << 19  # small enough for the cache, large enough to hide what a call of torch costs
_ROW = 512  # torch adds the squares of a row one after the other: so few lose nothing

_Part: TypeAlias = "tuple[float, float, float, float, int, int]"


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
    moments = torch.zeros(5, rows, dtype=torch.float64)
    integers = torch.zeros(2, rows, dtype=torch.int64)
    scratch = torch.empty(min(_CHUNK, max(x.numel() for x in tensors)))
    few: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(tensors):
        if x.numel() < _MANY:
            few.setdefault(wide(x.dtype), []).append(i)
            continue
        into = None if bins is None else bins[i]
        *seen, zeros, nonfinite = _merged(_look(x.view(-1), into, scratch, quick=quick))
        moments[:, i] = torch.tensor(seen, dtype=torch.float64)
        integers[:, i] = torch.tensor([zeros, nonfinite])
    for members in few.values():
        for some in _cachefuls(members, tensors):
            these = [tensors[i] for i in some]
            moments[:, some], integers[:, some], counted = _look_at_many(
                these, histogram, quick=quick
            )
            if bins is not None:
                bins[some] = counted
    return moments, integers, bins


def _cachefuls(members: list[int], tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """``members`` in groups whose tensors hold about a chunk of values together."""
    group: list[int] = []
    size = 0
    for i in members:
        group.append(i)
        size += tensors[i].numel() + BINS
        if size >= _CHUNK:
            yield group
            group, size = [], 0
    if group:
        yield group


def _look_at_many(
    tensors: Sequence[Tensor], histogram: bool, *, quick: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All results for small CPU tensors of one wide dtype, in as many calls as for one of them."""
    rows = len(tensors)
    lengths = torch.tensor([x.numel() for x in tensors])
    x = torch.cat([t.view(-1).to(wide(t.dtype)) for t in tensors])
    finite = x.isfinite()
    exact = torch.where(finite, x, 0).double()

    def each(values: Tensor, how: str, initial: float) -> Tensor:
        found: Tensor = torch.segment_reduce(values, how, lengths=lengths, initial=initial)
        return found

    low = each(torch.where(finite, exact, math.inf), "min", math.inf)
    high = each(torch.where(finite, exact, -math.inf), "max", -math.inf)
    absmax = torch.maximum(high, -low).clamp(min=0)
    nothing = torch.zeros(rows, dtype=torch.float64)
    sums = nothing if quick else each(exact, "sum", 0.0), each(exact.square(), "sum", 0.0)
    moments = torch.stack([*sums, absmax, low + 0.0, high + 0.0])  # no -0.0
    zeros = nothing if quick else each((x == 0).double(), "sum", 0.0)
    nonfinite = nothing if finite.all() else each((~finite).double(), "sum", 0.0)
    integers = torch.stack([zeros, nonfinite]).long()
    if not histogram:
        return moments, integers, integers
    places = torch.repeat_interleave(torch.arange(0, rows * BINS, BINS), lengths)
    counted = places.add_(_bins_of(x)).bincount(minlength=rows * BINS)
    return moments, integers, counted.view(rows, BINS)


def _merged(parts: list[_Part]) -> tuple[float, ...]:
    """A row of the results: sum, sum of squares, absmax, min, max, zeros, non-finite."""
    totals, squares, lows, highs, zeros, nonfinite = zip(*parts, strict=True)
    low, high = min(lows) + 0.0, max(highs) + 0.0  # no -0.0
    absmax = max(high, -low, 0.0)
    return sum(totals), sum(squares), absmax, low, high, sum(zeros), sum(nonfinite)


def _look(x: Tensor, bins: Tensor | None, scratch: Tensor, *, quick: bool) -> list[_Part]:
    """Sum, sum of squares, min, max, zeros and non-finite of each chunk of a large CPU tensor.

    Many float32 numbers are added in float32, which torch does pairwise and so loses about 1e-7;
    all else is added in float64. ``scratch``, as long as a chunk, saves asking for fresh memory,
    which costs more than the arithmetic. Nothing is fetched before the last chunk is done, because
    each time that takes as long as a tenth of a chunk. Counts are added to ``bins``.
    """
    into = wide(x.dtype)
    closely = into is not torch.float32
    chunks = torch.split(x, _CHUNK)
    ends: list[Tensor] = []
    norms, sums, counts, least = [], [], [], []
    may_be_zero: list[bool] = []
    for chunk in chunks:
        part = chunk.to(into)
        if bins is not None:
            source = chunk if chunk.dtype is torch.bfloat16 else part
            counts.append(_bins_of(source, scratch).bincount(minlength=BINS))
        ends += torch.aminmax(part)
        if closely:
            continue
        if quick or bins is not None:
            norms.append(_norm(part))
        else:  # the squares also tell whether there are zeros
            squares = torch.mul(part, part, out=scratch[: part.numel()])
            norms.append(squares.sum().double().sqrt())
            least.append(squares.amin())
        if not quick:
            sums.append(part.sum())
    if bins is not None:
        counted = torch.stack(counts)
        bins += counted.sum(0)
        may_be_zero = (counted[:, 0] + counted[:, 256] > 0).tolist()
    elif least:
        may_be_zero = (torch.stack(least) == 0).tolist()
    low_and_high, lengths, totals = _fetched(ends), _fetched(norms), _fetched(sums)
    found: list[_Part] = []
    for i, chunk in enumerate(chunks):
        low, high = low_and_high[2 * i : 2 * i + 2]
        # False where one is NaN; squares in this range do not overflow, nor do all of them vanish.
        ordinary = 1e-10 < max(high, -low) < 1e15
        if closely or not ordinary:
            found.append(_look_closely(chunk.to(into)))
        elif quick:
            found.append((0.0, lengths[i] ** 2, low, high, 0, 0))
        else:
            zeros = 0
            if low <= 0 <= high and may_be_zero[i]:
                zeros = chunk.numel() - int(chunk.to(into).count_nonzero())
            found.append((totals[i], lengths[i] ** 2, low, high, zeros, 0))
    return found


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of many float32, by way of those of short rows; float64, 0-dim."""
    end = x.numel() - x.numel() % _ROW
    rows = torch.linalg.vector_norm(x[:end].view(-1, _ROW), dim=1)
    if end < x.numel():
        rows = torch.cat([rows, torch.linalg.vector_norm(x[end:]).reshape(1)])
    whole: Tensor = torch.linalg.vector_norm(rows, dtype=torch.float64)
    return whole


def _fetched(numbers: list[Tensor]) -> list[float]:
    return torch.stack(numbers).tolist() if numbers else []


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


def _bins_of(x: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Bin of each value, from its bits: sign, and exponent brought into 0..255.

    Args:
        x: float32, float64 or bfloat16.
        scratch: float32, at least as long as ``x``, to hold the bins where they fit.
    """
    if x.dtype is torch.float64:
        bits = x.view(torch.int64)
        exponent = (bits >> 52).bitwise_and_(0x7FF).sub_(1023 - 127).clamp_(0, 255)
        return exponent.add_(bits < 0, alpha=256)
    kind, digits = (torch.int32, 23) if x.dtype is torch.float32 else (torch.int16, 7)
    out = None if scratch is None else scratch.view(kind)[: x.numel()]
    return torch.bitwise_right_shift(x.view(kind), digits, out=out).bitwise_and_(511)
