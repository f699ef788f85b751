"""One pass over many tensors: moments, extrema, counts and a histogram by sign and exponent."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, final

import torch
from torch import Tensor, nn

from learnables._native import statistics as native
from learnables._native import statistics_torch as torch_backend
from learnables._torch import is_dtensor, is_fake, is_uninitialised, local, why_no_values
from learnables.arguments import describe, require_flag, require_kind, require_whole
from learnables.collectives import Share, groups_over, reduce_over, share_of
from learnables.errors import ArgumentError, LearnablesError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BINS = 512
"""Bins of every histogram: 256 exponents of the positive half, then 256 of the negative half."""

_SUMS = ("count", "sum", "sum_of_squares", "zeros", "nonfinite")
_EXTREMA = ("absmax", "min", "max")
_COUNTS = ("count", "zeros", "nonfinite", "histogram")


@final
@dataclass(frozen=True)
class Statistics:
    """What one pass saw: one row per tensor. Rows of two statistics can be merged.

    All moments and extrema are those of the *finite* values; NaN and ±inf are only counted, in
    ``nonfinite``. A row without a finite value has ``min = inf``, ``max = -inf`` and zeros
    elsewhere, so that merging it changes nothing.

    Histogram bins do not depend on the dtype: bin ``256·s + k`` counts values whose sign bit is
    ``s`` and whose magnitude lies in ``[2^(k-127), 2^(k-126))``; the lower edges are
    ``bin_edges()``. Two bins hold more. ``k = 0``: everything below 2^-126, which is zeros,
    fp32 and bfloat16 subnormals and tiny fp64 values. ``k = 255``: everything from 2^128 up,
    which is ±inf, NaN and huge fp64 values. ``zeros`` and ``nonfinite`` tell their inhabitants
    apart. Bins of different steps, ranks, shards and dtypes are merged by adding integers.

    Attributes:
        count: Values seen, finite or not. Shape ``(rows,)``, int64. A complex number counts as
            two values, its real and its imaginary part.
        sum: Shape ``(rows,)``, float64.
        sum_of_squares: Shape ``(rows,)``, float64.
        absmax: Largest magnitude. Shape ``(rows,)``, float64.
        min: Smallest value. Shape ``(rows,)``, float64.
        max: Largest value. Shape ``(rows,)``, float64.
        zeros: Values equal to 0, of either sign. Shape ``(rows,)``, int64.
        nonfinite: NaN, inf and -inf. Shape ``(rows,)``, int64.
        histogram: Shape ``(rows, 512)``, int64; None where it was not asked for.
    """

    count: Tensor
    sum: Tensor
    sum_of_squares: Tensor
    absmax: Tensor
    min: Tensor
    max: Tensor
    zeros: Tensor
    nonfinite: Tensor
    histogram: Tensor | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.count)

    def __repr__(self) -> str:
        """A line per row, of the first thirty; of the histogram only that it is there."""
        shown = self[:30]
        columns = [shown.mean(), shown.std(), shown.min, shown.max, shown.zeros, shown.nonfinite]
        rows = zip(shown.count.tolist(), *(x.tolist() for x in columns), strict=True)
        names = ("count", "mean", "std", "min", "max", "zeros", "nonfinite")
        line = "{:>12}" + 4 * " {:>11.4g}" + " {:>9} {:>9}"
        left = len(self) - len(shown)
        return "\n".join(
            [
                f"Statistics: {len(self)} rows{'' if self.histogram is None else ', histograms'}",
                line.replace(".4g", "").format(*names),
                *(line.format(*row) for row in rows),
                *([f"{'…':>12} {left} more"] if left else []),
            ]
        )

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> "Statistics":
        """Some of the rows, as statistics again; an integer gives one row."""
        chosen = torch.arange(len(self), device=self.count.device)[rows].reshape(-1)
        return Statistics(**{name: x[chosen] for name, x in self._columns().items()})

    def merge(self, other: "Statistics") -> "Statistics":
        """The statistics of both, row by row: those of the two tensors of a row put together.

        Associative and commutative; exact but for the rounding of ``sum`` and
        ``sum_of_squares``. The histogram is dropped when one side lacks it.

        Raises:
            ArgumentError: ``other`` is of another kind.
            LearnablesError: The numbers of rows differ.

        Example:
            >>> a, b = ln.statistics([torch.ones(3)]), ln.statistics([-2 * torch.ones(1)])
            >>> both = a.merge(b)
            >>> both.count.item(), both.sum.item(), both.absmax.item()
            (4, 1.0, 2.0)
        """
        require_kind(other, "other", Statistics, wanted="Statistics", mend="ln.statistics(tensors)")
        if len(self) != len(other):
            raise LearnablesError(
                "statistics of different lists of tensors are not merged row by row",
                found=f"{len(self)} and {len(other)} rows",
                wanted="the same number of rows",
                mend="merge(a.total(), b.total()) merges everything into one row",
            )
        both = self.histogram is not None and other.histogram is not None
        return Statistics(
            **{name: getattr(self, name) + getattr(other, name) for name in _SUMS},
            absmax=torch.maximum(self.absmax, other.absmax),
            min=torch.minimum(self.min, other.min),
            max=torch.maximum(self.max, other.max),
            histogram=self.histogram + other.histogram if both else None,  # type: ignore[operator]
        )

    def total(self) -> "Statistics":
        """All rows merged into one: the statistics of all tensors put together."""
        if len(self) == 0:
            return statistics([torch.zeros(0)], histogram=self.histogram is not None)
        return Statistics(
            **{name: getattr(self, name).sum(0, keepdim=True) for name in _SUMS},
            absmax=self.absmax.amax(0, keepdim=True),
            min=self.min.amin(0, keepdim=True),
            max=self.max.amax(0, keepdim=True),
            histogram=None if self.histogram is None else self.histogram.sum(0, keepdim=True),
        )

    @property
    def finite(self) -> Tensor:
        """Number of finite values. Shape ``(rows,)``, int64."""
        return self.count - self.nonfinite

    def norm(self) -> Tensor:
        """Euclidean norm of the finite values. Shape ``(rows,)``, float64."""
        return self.sum_of_squares.sqrt()

    def mean(self) -> Tensor:
        """Mean of the finite values; NaN where there are none. Shape ``(rows,)``, float64."""
        return self.sum / self.finite

    def rms(self) -> Tensor:
        """Root of the mean square; NaN where there are no values. Shape ``(rows,)``, float64."""
        return (self.sum_of_squares / self.finite).sqrt()

    def std(self) -> Tensor:
        """Standard deviation √(E[x²] − E[x]²), not corrected. Shape ``(rows,)``, float64.

        Exact to about 1e-8·|mean|: the moments are float64, and the difference cancels.
        """
        return (self.sum_of_squares / self.finite - self.mean().square()).clamp(min=0).sqrt()

    def below(self, dtype: torch.dtype, *, normal: bool = False) -> Tensor:
        """Share of the values, zeros aside, that casting to ``dtype`` would turn into 0.

        Read off the histogram: it counts magnitudes under half of the smallest number of
        ``dtype``. That half itself, a tie, rounds to 0 too and is not counted. In bfloat16 and
        float32 that number lies under the last bin, so there everything below 2^-126 counts.

        Args:
            dtype: Any floating dtype, ``torch.float8_*`` included.
            normal: Count instead what is below the smallest *normal* number of ``dtype``:
                values that become 0 or keep fewer bits than they should.

        Returns:
            Shape ``(rows,)``, float64; NaN where every value is zero or non-finite.

        Raises:
            ArgumentError: ``dtype`` is no floating dtype.
            LearnablesError: The statistics were taken without a histogram.

        Example:
            >>> gradient = torch.tensor([1e-9, 1e-5, 1.0, 0.0])
            >>> ln.statistics([gradient]).below(torch.float16).item()
            0.333...
        """
        info = _range_of(dtype)
        threshold = info.tiny if normal else info.tiny * info.eps / 2
        return self._share(slice(0, max(1, round(math.log2(threshold)) + 127)), "below")

    def above(self, dtype: torch.dtype) -> Tensor:
        """Share of the values, zeros aside, that are too large for ``dtype``.

        Counts magnitudes from the first power of two above ``torch.finfo(dtype).max``; those
        between the two share their bin with numbers that fit, compare ``absmax`` for them.

        Args:
            dtype: Any floating dtype.

        Returns:
            Shape ``(rows,)``, float64; NaN where every value is zero or non-finite.

        Raises:
            ArgumentError: ``dtype`` is no floating dtype.
            LearnablesError: The statistics were taken without a histogram.
        """
        top = math.frexp(_range_of(dtype).max)[1]
        return self._share(slice(min(top + 127, 256), 256), "above")

    def _share(self, magnitudes: slice, asked: str) -> Tensor:
        if self.histogram is None:
            raise LearnablesError(
                f"{asked}() reads the histogram, and there is none",
                found="statistics taken with histogram=False",
                wanted="histogram=True",
                mend="ln.statistics(tensors, histogram=True)",
            )
        bins = self.histogram[:, :256] + self.histogram[:, 256:]
        bins[:, 0] -= self.zeros
        bins[:, 255] -= self.nonfinite
        share: Tensor = bins[:, magnitudes].sum(1).double() / (self.finite - self.zeros)
        return share

    def pack(self) -> Tensor:
        """Everything in one float64 vector: the additive part first, then three maxima.

        Counts up to 2^53 are exact in it. One such vector is one copy to the host, and one sum
        and one maximum over ranks.

        Returns:
            Shape ``(rows · 520,)``, or ``(rows · 8,)`` without a histogram.
        """
        sums = torch.stack([getattr(self, name).double() for name in _SUMS])
        maxima = torch.stack([self.absmax, -self.min, self.max])
        parts = [sums, maxima] if self.histogram is None else [sums, self.histogram, maxima]
        return torch.cat([part.reshape(-1).double() for part in parts])

    @classmethod
    def unpack(cls, packed: Tensor, rows: int) -> "Statistics":
        """The statistics that ``pack`` made ``packed`` of.

        Args:
            packed: What ``pack`` gave. Shape ``(rows · 520,)`` or ``(rows · 8,)``.
            rows: Number of rows.

        Raises:
            LearnablesError: The length fits neither.
        """
        if len(packed) not in {8 * rows, (8 + BINS) * rows}:
            raise LearnablesError(
                "this is no packed statistics",
                found=f"{len(packed)} numbers for {rows} rows",
                wanted=f"{8 * rows} or {(8 + BINS) * rows}",
            )
        sums = packed[: 5 * rows].view(5, rows)
        histogram, maxima = packed[5 * rows : -3 * rows], packed[-3 * rows :].view(3, -1)
        if rows == 0:
            histogram, maxima = packed, packed.view(3, 0)
        columns = dict(zip(_SUMS, sums, strict=True))
        return cls(
            **{k: v.long() if k in _COUNTS else v.clone() for k, v in columns.items()},
            absmax=maxima[0].clone(),
            min=-maxima[1],
            max=maxima[2].clone(),
            histogram=histogram.view(rows, BINS).long() if len(histogram) else None,
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Statistics":
        """The same on ``device``, in one copy."""
        if self.count.device == torch.device(device):
            return self
        packed = self.pack().to(device, non_blocking=non_blocking)
        return Statistics.unpack(packed, len(self))

    @classmethod
    def cat(cls, parts: Sequence["Statistics"]) -> "Statistics":
        """The rows of all ``parts``, one after the other; at least one part."""
        columns = [part._columns() for part in parts]
        shared = [name for name in columns[0] if all(name in part for part in columns)]
        return cls(**{name: torch.cat([part[name] for part in columns]) for name in shared})

    def _zip(
        self, other: "Statistics", function: Callable[[Tensor, Tensor], Tensor]
    ) -> "Statistics":
        """Statistics made field by field of two; ``other`` has the fields of this one."""
        theirs = other._columns()
        return Statistics(**{k: function(x, theirs[k]) for k, x in self._columns().items()})

    def _columns(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in values.items() if x is not None}


def _range_of(dtype: torch.dtype) -> torch.finfo:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(
            "dtype is no floating dtype",
            where="dtype",
            found=str(dtype) if isinstance(dtype, torch.dtype) else describe(dtype),
            wanted="a dtype that values could be cast to, such as torch.float16",
            mend="dtype=torch.float16",
        )
    return torch.finfo(dtype)


def bin_edges() -> Tensor:
    """Edges of the magnitude bins: bin ``k`` holds ``edges[k] ≤ |x| < edges[k + 1]``.

    Returns:
        Shape ``(257,)``, float64: ``edges[0] = 0``, ``edges[256] = inf`` and between them
        ``edges[k] = 2^(k-127)``.
    """
    edges = torch.arange(257, dtype=torch.float64).sub(127).exp2()
    edges[0], edges[256] = 0.0, math.inf
    return edges


def statistics(
    tensors: Iterable[Tensor] | Tensor,
    histogram: bool = True,
    *,
    threads: int | None = None,
) -> Statistics:
    """Count, moments, extrema and a histogram of every tensor, one row each.

    Every number is that of the tensor's values as real numbers: integers and booleans are
    taken as such (int64 beyond 2^53 rounded to float64), complex numbers as their real and
    imaginary parts, half and quarter precision exactly as they are. Of a sparse tensor the stored
    values are looked at, duplicates of a coordinate summed first; of a masked one those that the
    mask shows; of a nested one those of its parts. The row of a DTensor is that of the whole
    tensor, shards counted once and replicas not again: a collective call, which every rank of its
    mesh makes with the same list.

    Args:
        tensors: Any tensors: any shape, also empty or 0-dimensional, any strides, any device
            but meta, dtypes mixed as you like. Read only.
        histogram: Whether to count the values by sign and exponent too.
        threads: Threads of the native backend; ``torch.get_num_threads()`` when None. The
            result does not depend on it, bit for bit.

    Returns:
        Rows in the order of ``tensors``, on the device of the first.

    Raises:
        ArgumentError: ``tensors`` is no tensor and no list, or another argument is of another
            kind.
        LearnablesError: Something in the list has no values to look at: no tensor, a meta, fake or
            lazy tensor, one that packs its values, a partial DTensor. Or it is called where no
            tensor has any, inside ``torch.func.vmap``. Or the environment forces a backend that is
            not there.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> seen = ln.statistics(layer.parameters())
        >>> seen.count.tolist(), seen.zeros.tolist(), tuple(seen.histogram.shape)
        ([16, 4], [0, 0], (2, 512))

    Cost:
        Sums are in float64 (the torch backend adds many float32 numbers in float32, pairwise,
        good to 1e-6). The native backend reads the memory once: little longer than ``torch.sum``
        without a histogram, and a small multiple of it with one; benchmarks/stats.py. Views that
        leave gaps in memory, such as slices, are copied first.
    """
    return _look(tensors, histogram, threads, quick=False)


@final
@dataclass(frozen=True)
class Magnitudes:
    """The part of ``Statistics`` that costs least: how large, and whether all is finite.

    Attributes:
        norm: Euclidean norm of the finite values. Shape ``(rows,)``, float64.
        absmax: Largest finite magnitude. Shape ``(rows,)``, float64.
        min: Smallest finite value. Shape ``(rows,)``, float64.
        max: Largest finite value. Shape ``(rows,)``, float64.
        nonfinite: NaN, inf and -inf. Shape ``(rows,)``, int64.
    """

    norm: Tensor
    absmax: Tensor
    min: Tensor
    max: Tensor
    nonfinite: Tensor


def magnitudes(tensors: Iterable[Tensor] | Tensor, *, threads: int | None = None) -> Magnitudes:
    """Norm, extrema and non-finite values of every tensor, one row each.

    For a look at every step where the native kernel is not there: the torch backend takes half
    of the time that it takes for ``statistics`` without a histogram. The native kernel takes the
    same for both.

    Args:
        tensors: As for ``statistics``.
        threads: As for ``statistics``.

    Returns:
        Rows in the order of ``tensors``; the norm is good to 1e-6.

    Raises:
        LearnablesError: As ``statistics``.

    Example:
        >>> seen = magnitudes([torch.tensor([3.0, -4.0, torch.inf])])
        >>> seen.norm.item(), seen.min.item(), seen.nonfinite.item()
        (5.0, -4.0, 1)
    """
    seen = _look(tensors, False, threads, quick=True)
    return Magnitudes(seen.norm(), seen.absmax, seen.min, seen.max, seen.nonfinite)


def by_kernel(
    tensors: Sequence[Tensor], histogram: bool, *, threads: int | None = None
) -> Statistics | None:
    """What the native kernel sees, at a microsecond per tensor: the usual case.

    None where it is not there, another backend is forced, or it cannot read a tensor as it is.
    """
    if os.environ.get(FORCE) or not native.available()[0] or not all(map(_is_plain, tensors)):
        return None
    if why_no_values():  # there may be no memory behind a tensor, nor behind the results
        return None
    return _by_native(tensors, histogram, threads)


def _look(
    tensors: Iterable[Tensor] | Tensor, histogram: bool, threads: int | None, *, quick: bool
) -> Statistics:
    listed = _listed(tensors)
    require_flag(histogram, "histogram")
    threads = None if threads is None else require_whole(threads, "threads", least=1)
    require_values()
    if not listed:
        return _empty(0, histogram)
    seen = by_kernel(listed, histogram, threads=threads)
    if seen is not None:
        return seen
    forced = os.environ.get(FORCE)
    with torch.no_grad():
        shares = {i: share_of(x, f"tensors[{i}]") for i, x in enumerate(listed) if is_dtensor(x)}
        flat = [_values(local(x) if i in shares else x, i) for i, x in enumerate(listed)]
        groups: dict[tuple[str, torch.device], list[int]] = {}
        for i, x in enumerate(flat):
            groups.setdefault((_backend(x, forced).name, x.device), []).append(i)
        parts = []
        for (name, _), members in groups.items():
            group = [flat[i] for i in members]
            if name == "native":
                parts.append(_by_native(group, histogram, threads))
            elif name == "triton":
                parts.append(_assemble(group, *_triton().run(group, histogram)))
            else:
                parts.append(_assemble(group, *_by_torch(group, members, histogram, quick)))
        seen = parts[0]
        if len(parts) > 1:
            together = Statistics.cat([part.to(flat[0].device) for part in parts])
            order = torch.tensor([i for members in groups.values() for i in members])
            seen = together[order.argsort()]
        return _across_ranks(seen, shares) if shares else seen


def require_values() -> None:
    """Refuse to look where no tensor has a value.

    Raises:
        LearnablesError: Inside a transform of ``torch.func``, or under fake tensors.
    """
    if why := why_no_values():
        raise LearnablesError(
            "there are no values to look at here",
            found=why,
            wanted="a call outside of it",
            mend="call ln.statistics on what it returns",
        )


def _listed(tensors: Iterable[Tensor] | Tensor) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    if isinstance(tensors, Mapping) or not isinstance(tensors, Iterable):
        mend = "ln.statistics(tensors.values())" if isinstance(tensors, Mapping) else ""
        mend = "ln.statistics(module.parameters())" if isinstance(tensors, nn.Module) else mend
        raise ArgumentError(
            "tensors is no list of tensors",
            where="tensors",
            found=describe(tensors),
            wanted="a torch.Tensor, or several",
            mend=mend or "ln.statistics([tensor])",
        )
    return list(tensors)


def _across_ranks(seen: Statistics, shares: dict[int, Share]) -> Statistics:
    """Make the rows of DTensors global: two collectives per mesh, in the order of first use."""
    for mesh in dict.fromkeys(share.mesh for share in shares.values()):
        members = {i: share for i, share in shares.items() if share.mesh == mesh}
        dims = sorted(frozenset[int]().union(*(share.sharded for share in members.values())))
        if dims and mesh.get_coordinate() is not None:  # else this rank has everything, or nothing
            seen = _across_mesh(seen, members, mesh, dims)
    return seen


def _across_mesh(
    seen: Statistics, members: dict[int, Share], mesh: "DeviceMesh", dims: list[int]
) -> Statistics:
    groups, covered = groups_over(mesh, dims)
    rows = torch.tensor(list(members), device=seen.count.device)
    speaks = torch.tensor([s.counts(covered) for s in members.values()], device=rows.device)
    nothing = _empty(len(members), seen.histogram is not None, rows.device)
    mine = seen[rows]._zip(nothing, lambda x, y: torch.where(_column(speaks, x), x, y))
    packed = mine.pack().to(mesh.device_type)
    reduce_over(groups, packed, len(packed) - len(_EXTREMA) * len(members))
    everyones = Statistics.unpack(packed.to(rows.device), len(members))
    return seen._zip(everyones, lambda x, y: x.index_copy(0, rows, y))


def _column(flags: Tensor, like: Tensor) -> Tensor:
    return flags if like.ndim == 1 else flags[:, None]


FORCE = "LEARNABLES_STATISTICS"
"""Environment variable that forces one backend: ``torch``, ``native`` or ``triton``."""


class Backend(NamedTuple):
    """Who does the looking, and why."""

    name: str
    why: str


def backend(x: Tensor | None = None) -> Backend:
    """Which backend looks at ``x`` (a float32 CPU tensor when None), and why that one.

    ``native`` needs the built kernel and a CPU tensor of float32, float64, float16 or bfloat16;
    ``triton`` a GPU tensor of one of these and Triton, which comes with CUDA builds of torch;
    ``torch`` reads everything. The environment variable ``LEARNABLES_STATISTICS`` forces one
    for the dtypes that it can read.

    Raises:
        LearnablesError: The environment forces a backend that is unknown or not there.

    Example:
        >>> backend(torch.zeros(3, dtype=torch.int8))
        Backend(name='torch', why='dtype torch.int8')
    """
    with torch.no_grad():
        return _backend(_values(torch.empty(0) if x is None else x, 0), os.environ.get(FORCE))


def _backend(x: Tensor, forced: str | None) -> Backend:
    """Choose for one tensor that ``_values`` prepared.

    Raises:
        LearnablesError: As ``backend``.
    """
    if forced == "torch":
        return Backend("torch", f"{FORCE}=torch")
    if type(x) is not Tensor:
        return Backend("torch", f"a {type(x).__name__} has no memory of its own")
    if x.dtype not in native.DTYPES:
        return Backend("torch", f"dtype {x.dtype}")
    name = forced or ("native" if x.is_cpu else "triton")
    if name == "native":
        there, why = native.available() if x.is_cpu else (False, f"device {x.device.type}")
    elif name == "triton":
        there, why = _triton_available(x.device)
    else:
        raise LearnablesError(
            "no backend has this name",
            found=f"{FORCE}={forced}",
            wanted="torch, native or triton",
            mend=f"unset {FORCE}",
        )
    if forced and not there:
        raise LearnablesError(
            f"the {forced} backend is forced, and cannot look at this tensor",
            found=why,
            wanted="a built kernel" if name == "native" else "a GPU, or TRITON_INTERPRET=1",
            mend=f"unset {FORCE}",
        )
    return Backend(name if there else "torch", why)


def _triton() -> ModuleType:
    return import_module("learnables._native.statistics_triton")


def _triton_available(device: torch.device) -> tuple[bool, str]:
    try:
        there: tuple[bool, str] = _triton().available(device)
    except ImportError as error:
        return False, str(error)
    return there


def _is_plain(x: Tensor) -> bool:
    """Whether the native kernel can read ``x`` as it is."""
    return (
        type(x) in _PLAIN
        and x.is_cpu
        and x.dtype in native.DTYPES
        and x.layout is torch.strided
        and x.is_contiguous()
        and not x.is_neg()
    )


_PLAIN = (Tensor, nn.Parameter)


def _values(x: Tensor, index: int) -> Tensor:
    """What ``x`` holds, as a real, strided, one-dimensional tensor outside autograd.

    Raises:
        LearnablesError: It holds no values that can be read.
    """
    where = f"tensors[{index}]"
    if not isinstance(x, Tensor):
        raise LearnablesError(
            "only tensors have statistics",
            where=where,
            found=type(x).__name__,
            wanted="a torch.Tensor",
            mend="leave it out of the list: [p.grad for p in ps if p.grad is not None]",
        )
    if is_uninitialised(x):
        raise LearnablesError(
            "a lazy parameter has no values yet",
            where=where,
            found=type(x).__name__,
            wanted="a tensor in memory",
            mend="model(batch), which gives it its shape",
        )
    x = x.detach()
    if x.is_meta or is_fake(x):
        kind = "meta" if x.is_meta else "fake"
        raise LearnablesError(
            f"a {kind} tensor holds no values",
            where=where,
            found=f"shape {tuple(x.shape)}, {'device meta' if x.is_meta else type(x).__name__}",
            wanted="a tensor in memory",
            mend="model.to_empty(device='cpu'), then initialise or load",
        )
    if x.is_quantized or x.dtype in _UNREADABLE:
        raise LearnablesError(
            "this dtype packs its values in a way we do not read",
            where=where,
            found=str(x.dtype),
            wanted="a floating, integer, boolean or complex dtype",
            mend="dequantise it first: x.dequantize()",
        )
    try:
        x = _stored(x)
        if x.is_complex():
            x = torch.view_as_real(x.resolve_conj())
        if x.device.type == "mps":
            x = x.cpu()  # MPS has no float64 to add up in
        return _in_memory_order(x.resolve_neg())
    except _REFUSALS as error:
        refused = _unreadable(x, where, error)
        raise refused from error


def _stored(x: Tensor) -> Tensor:
    """The values that ``x`` holds as a strided tensor, in whatever layout it holds them."""
    if torch.masked.is_masked_tensor(x):
        return x.get_data()[x.get_mask()]  # type: ignore[no-untyped-call,no-any-return]
    if x.is_nested:
        nothing = torch.empty(0, dtype=x.dtype, device=x.device)
        return torch.cat([nothing, *(part.reshape(-1) for part in x.unbind())])
    if x.layout is torch.strided:
        return x
    if x.layout is torch.sparse_coo:
        return x.coalesce().values()
    return x.to_dense() if x.is_mkldnn else x.values()


_REFUSALS = (RuntimeError, TypeError, ValueError)  # of torch; RecursionError is the first too


def _unreadable(x: Tensor, where: str, error: Exception) -> LearnablesError:
    return LearnablesError(
        "the values of this tensor cannot be read",
        where=where,
        found=f"{type(x).__name__}, {x.dtype}: {str(error).partition(chr(10))[0][:160]}",
        wanted="a tensor whose values are numbers in memory",
        mend="x.to_dense(), or whatever makes a torch.Tensor of it",
    )


def _by_torch(
    tensors: Sequence[Tensor], indices: Sequence[int], histogram: bool, quick: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What torch's own operations see; a class of tensors need not have them.

    Raises:
        LearnablesError: One has not.
    """
    try:
        return torch_backend.run(tensors, histogram, quick=quick)
    except _REFUSALS:
        for i, x in zip(indices, tensors, strict=True):
            try:
                torch_backend.run([x], histogram, quick=quick)
            except _REFUSALS as error:
                refused = _unreadable(x, f"tensors[{i}]", error)
                raise refused from error
        raise


_UNREADABLE = {
    getattr(torch, name)
    for name in (
        *("float4_e2m1fn_x2", "bits1x8", "bits2x4", "bits4x2", "bits8", "bits16"),
        *(f"{sign}int{digits}" for sign in ("", "u") for digits in range(1, 8)),
    )
    if hasattr(torch, name)
}


def _in_memory_order(x: Tensor) -> Tensor:
    """``x`` as one dimension, without a copy where its values fill their memory (transposed)."""
    if not x.is_contiguous():
        stride = x.stride()
        by_stride = sorted(range(x.ndim), key=lambda dim: -stride[dim])
        x = x.permute(*by_stride)
    return x.reshape(-1).contiguous()


def _empty(rows: int, histogram: bool, device: torch.device | str = "cpu") -> Statistics:
    """Rows that saw nothing."""

    def number() -> Tensor:
        return torch.zeros(rows, dtype=torch.float64, device=device)

    def integer(*shape: int) -> Tensor:
        return torch.zeros(rows, *shape, dtype=torch.int64, device=device)

    return Statistics(
        count=integer(),
        sum=number(),
        sum_of_squares=number(),
        absmax=number(),
        min=number() + math.inf,
        max=number() - math.inf,
        zeros=integer(),
        nonfinite=integer(),
        histogram=integer(BINS) if histogram else None,
    )


def _by_native(tensors: Sequence[Tensor], histogram: bool, threads: int | None) -> Statistics:
    wanted = torch.get_num_threads() if threads is None else threads
    return _assemble(tensors, *native.run(tensors, histogram, threads=wanted))


def _assemble(
    tensors: Sequence[Tensor], moments: Tensor, integers: Tensor, bins: Tensor | None
) -> Statistics:
    """Statistics whose columns are the rows of what a backend filled."""
    sizes = torch.tensor([x.numel() for x in tensors])
    if moments.is_cuda:
        sizes = sizes.pin_memory().to(moments.device, non_blocking=True)
    return Statistics(
        count=sizes,
        sum=moments[0],
        sum_of_squares=moments[1],
        absmax=moments[2],
        min=moments[3],
        max=moments[4],
        zeros=integers[0],
        nonfinite=integers[1],
        histogram=bins,
    )
