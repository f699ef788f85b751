"""Many parameters with one constraint, enforced in one call.

Parameters are grouped by constraint, shape, dtype, device and the way they are sharded. All
Python work that can be done once is done when the group is built; the call after the step stacks,
enforces and copies back, and where the device is an accelerator it never waits for it.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import add_to_all_, copy_all_, distribute_like, gather, is_dtensor, local
from learnables.sets.base import Set, computing_dtype, full_precision, may_be_written
from learnables.sets.constraint import Constraint

_MOMENTA = ("exp_avg", "momentum_buffer")


@final
@dataclass(eq=False)
class Kept:
    """One parameter that is kept in a set.

    Attributes:
        name: Its qualified name, for messages.
        parameter: The parameter; looked up again when its owner holds another one.
        constraint: Where it is kept, and how.
        owner: The module that owns it; None where only the parameter is known.
        local_name: Its name in there.
    """

    name: str
    parameter: nn.Parameter
    constraint: Constraint
    owner: nn.Module | None = field(default=None, repr=False)
    local_name: str = ""

    def refresh(self) -> bool:
        """Take the Parameter that the owner holds now; whether it is another one."""
        if self.owner is None:
            return False
        now = self.owner._parameters.get(self.local_name)
        if now is None or now is self.parameter:
            return False
        self.parameter = now
        return True


#: Where the points of a sharded parameter are: here, in rows over ranks, or only in the whole.
Placing = Literal["here", "rows", "whole"]


def placing_of(param: Tensor, constraint: Constraint) -> Placing:
    """How much of a parameter a rank must see to enforce its constraint.

    Entries and rows of their own need nothing of the others; a tall matrix cut between rows needs
    the sum of the Gram matrices; anything else is gathered.
    """
    if not is_dtensor(param):
        return "here"
    cut = {p.dim for p in param.placements if p.is_shard()}  # type: ignore[attr-defined]
    of, ndim = constraint.set, param.ndim
    if not cut or of.point_ndim == 0:
        return "here"
    if constraint.view is None and max(cut) < ndim - of.point_ndim:
        return "here"
    if of.point_ndim == 1 and constraint.view == "rows" and cut == {0} and ndim > 1:
        return "here"
    points = constraint.shape_of_points(param.shape)
    tall = len(points) == 2 and points[0] >= points[1]
    if of.needs_only_gram and constraint.keeps_rows and tall and cut == {0}:
        return "rows"
    return "whole"


def _key(kept: Kept) -> Hashable:
    p, placing = kept.parameter, placing_of(kept.parameter, kept.constraint)
    sharding = (p.device_mesh, p.placements) if is_dtensor(p) else None  # type: ignore[attr-defined]
    # Whatever communicates is grouped by its global shape, or ranks would group differently.
    x = local(p) if placing == "here" else p
    shape = x.shape if kept.constraint.set.point_ndim == 2 else _last(kept, x)
    return (kept.constraint, shape, p.dtype, p.device, sharding, placing)


def _last(kept: Kept, x: Tensor) -> Hashable:
    """Vectors of one length can be enforced together, whatever number of them there is."""
    of = kept.constraint.set
    return None if of.point_ndim == 0 else kept.constraint.shape_of_points(x.shape)[-1]


def grouped(kept: Iterable[Kept], *, pad: bool | None = None) -> list["Group"]:
    """Groups in the order of their first parameter, which is the same on every rank.

    Args:
        kept: The parameters.
        pad: Whether matrices of nearly the same shape are padded to one; where a call costs more
            than a product, on accelerators, when None.
    """
    found: dict[Hashable, list[Kept]] = {}
    for one in kept:
        found.setdefault(_key(one), []).append(one)
    return [Group(members) for members in _merged(list(found.values()), pad)]


def _merged(groups: list[list[Kept]], pad: bool | None) -> list[list[Kept]]:
    """Groups that differ in shape only become one, while padding at most doubles the work."""
    merged: list[list[Kept]] = []
    for members in groups:
        for others in merged:
            if _kin(members[0], pad) is not None and _kin(members[0], pad) == _kin(others[0], pad):
                shapes = [one.constraint.shape_of_points(one.parameter.shape) for one in others]
                shapes += [one.constraint.shape_of_points(one.parameter.shape) for one in members]
                rows, columns = padded_shape(shapes)
                work = len(shapes) * rows * columns * min(rows, columns)
                if work <= 2 * sum(n * k * min(n, k) for *_, n, k in shapes):
                    others += members
                    break
        else:
            merged.append(members)
    return merged


def _kin(kept: Kept, pad: bool | None) -> Hashable | None:
    """What two groups must have in common to be padded to one shape; None where none is."""
    p, constraint = kept.parameter, kept.constraint
    wanted = p.device.type != "cpu" if pad is None else pad
    if not (wanted and constraint.set.pads_with_unit) or is_dtensor(p):
        return None
    n, k = constraint.shape_of_points(p.shape)[-2:]
    return (constraint, p.dtype, p.device, n >= k)


def padded_shape(shapes: Iterable[Sequence[int]]) -> tuple[int, int]:
    """The smallest matrix that each of ``shapes`` fits into with a unit matrix beside it.

    All are tall or all are wide. Rows beyond a tall matrix hold the unit matrix of the columns
    beyond it.
    """
    sizes = [tuple(shape[-2:]) for shape in shapes]
    if all(n >= k for n, k in sizes):
        columns = max(k for _, k in sizes)
        return max(n + columns - k for n, k in sizes), columns
    rows = max(n for n, _ in sizes)
    return rows, max(k + rows - n for n, k in sizes)


def _places(xs: Sequence[Tensor]) -> Hashable:
    """Equal for two looks where nothing moved: much less to do than looking at all of it again."""
    return tuple([(x.data_ptr(), x.numel(), x.dtype, x.is_contiguous()) for x in xs])


@final
class Group:
    """Parameters that are enforced together, and what the last call said about them."""

    def __init__(self, members: Sequence[Kept]) -> None:
        self.members = list(members)
        self.constraint = members[0].constraint
        self.placing = placing_of(members[0].parameter, self.constraint)
        self.status: Tensor | None = None  # one code a point, on the device
        self.calls = self.skipped = 0
        self._estimate = Later()
        self._generator = torch.Generator().manual_seed(0)
        self._options = {"total": self._total} if self.placing == "rows" else {}
        self._sizes: list[int] = []  # points of each member, from the last call
        self._at: Hashable = None  # where a kernel found the values, and how many points there
        self._counts: list[int] = []
        params: list[Tensor] = [one.parameter for one in self.members]
        self._padded: tuple[int, int] | None = None  # the shape that matrices are padded to
        if self.placing == "here" and self.constraint.set.point_ndim == 2:
            shapes = {tuple(self._shape_of(local(p).shape)[-2:]) for p in params}
            self._padded = padded_shape(shapes) if len(shapes) > 1 else None
        alike = all(p.shape == params[0].shape and not is_dtensor(p) for p in params)
        plain = alike and self.constraint.view is None and self.constraint.set.point_ndim > 0
        # One of our kernels, values that are here, and no estimate that may spare the call.
        has_kernel = type(self.constraint.set).enforce_ is not Set.enforce_
        self._is_direct = (
            has_kernel
            and self.placing == "here"
            and self.constraint.lazy is None
            and self._padded is None
        )
        #: Stacked and copied back as they are; the usual case has the least to do in Python.
        self._alike = params if plain and len(params) > 1 else None

    def project_(self) -> None:
        """Bring the values back into the set."""
        if self._in_place_():
            self.calls += 1
            return
        of = self.constraint.set
        params: list[Tensor] = [one.parameter for one in self.members]
        with full_precision(params[0].device):
            batch, shapes = self._stacked(params) if self._alike is None else self._stack()
            if batch.numel() == 0 and self.placing != "rows":
                return
            if self._may_skip(batch):
                self.skipped += 1
                return
            self.calls += 1
            value, self.status = of.enforce(batch, **self._options)
            if value is batch:
                return
            if self._alike is None:
                self._write_back_(params, value, shapes)
            else:
                copy_all_(self._alike, value.unbind())

    def _in_place_(self) -> bool:
        """Whether a native kernel did it where the values lie, without stacking them."""
        if not self._is_direct:
            return False
        params: list[Tensor] = [one.parameter for one in self.members]
        if self._alike is None:
            params = [self.constraint.points(local(p).detach()) for p in params]
        at = None if torch.compiler.is_compiling() else _places(params)
        if at is None or at != self._at:
            if not all(map(may_be_written, params)):
                return False
            if self._alike is None and not self._are_views(params):
                return False
            ndim = self.constraint.set.point_ndim
            self._counts = [math.prod(x.shape[: x.ndim - ndim]) for x in params]
            self._at = at
        status = self.constraint.set.enforce_(params)
        if status is None:
            return False
        self.status, self._sizes = status, self._counts
        return True

    def _are_views(self, points: Sequence[Tensor]) -> bool:
        """Whether writing points writes the parameters: a view may have had to copy."""
        here = [local(one.parameter).data_ptr() for one in self.members]
        return here == [x.data_ptr() for x in points]

    def before_step_(self) -> None:
        """Take the part across the set out of the gradients."""
        self._to_tangent_([(one, one.parameter.grad) for one in self.members])

    def momentum_(self, optimizer: Optimizer) -> None:
        """Take the part across the set out of the optimizer's momentum."""
        for name in _MOMENTA:
            states = [optimizer.state.get(one.parameter, {}) for one in self.members]
            self._to_tangent_(
                [(one, s.get(name)) for one, s in zip(self.members, states, strict=True)]
            )

    def _to_tangent_(self, pairs: Iterable[tuple[Kept, Tensor | None]]) -> None:
        live = [(one, g) for one, g in pairs if isinstance(g, Tensor)]
        if not live or self._to_tangent_in_place_(live):
            return
        with full_precision(live[0][1].device):
            x, _ = self._stacked([one.parameter for one, _ in live])
            g, shapes = self._stacked([g for _, g in live], unit=0.0)
            tangent = self.constraint.set.tangent(x, g.to(x.dtype), **self._options)
            self._write_back_([g for _, g in live], tangent, shapes)

    def _to_tangent_in_place_(self, live: Sequence[tuple[Kept, Tensor]]) -> bool:
        """Whether a native kernel did it where the gradients lie."""
        if self.placing != "here" or self._padded is not None:
            return False
        xs = [self.constraint.points(local(one.parameter).detach()) for one, _ in live]
        gs = [self.constraint.points(local(g).detach()) for _, g in live]
        if not all(map(may_be_written, (*xs, *gs))):
            return False
        is_there = all(
            local(g).data_ptr() == x.data_ptr() for (_, g), x in zip(live, gs, strict=True)
        )
        return is_there and self.constraint.set.to_tangent_(xs, gs)

    def _may_skip(self, batch: Tensor) -> bool:
        lazy, of = self.constraint.lazy, self.constraint.set
        if lazy is None:
            return False
        # One call old on an accelerator, so waiting for it is rarely noticed; ranks that decided by
        # what happens to have arrived would drift apart or hang.
        last = self._estimate.read(wait=True)
        self._estimate.post(of.estimate(batch, self._generator, **self._options).amax())
        if batch.device.type == "cpu":
            last = self._estimate.read(wait=True)
        return last is not None and float(last) <= lazy

    def _stack(self) -> tuple[Tensor, list[torch.Size]]:
        assert self._alike is not None
        batch = torch.stack(self._alike)
        points = math.prod(batch.shape[1 : batch.ndim - self.constraint.set.point_ndim])
        self._sizes = [points] * len(self._alike)
        return batch.to(computing_dtype(batch.dtype)), []

    def _stacked(
        self, params: Sequence[Tensor], unit: float = 1.0
    ) -> tuple[Tensor, list[torch.Size]]:
        """All points in one batch of at least 32 bits, and the shape each parameter has.

        ``unit`` stands on the diagonal beside matrices that are padded.
        """
        # Detached, because a view of a Parameter asks for a gradient even under no_grad.
        here = [gather(p) if self.placing == "whole" else local(p) for p in params]
        here = [x.detach() for x in here]
        shapes = [x.shape for x in here]
        points = [self.constraint.points(x) for x in here]
        ndim = self.constraint.set.point_ndim
        same = all(x.shape == points[0].shape for x in points)
        self._sizes = [math.prod(x.shape[: x.ndim - ndim]) for x in points]
        if self._padded is not None:
            return self._pad(points, unit), shapes
        if len(points) == 1:
            batch = points[0]
        elif same and ndim:
            batch = torch.stack(points)
        else:
            batch = torch.cat([x.reshape(-1, *x.shape[x.ndim - ndim :]) for x in points])
        point = batch.shape[batch.ndim - ndim :]
        return batch.reshape(-1, *point).to(computing_dtype(batch.dtype)), shapes

    def _pad(self, points: Sequence[Tensor], unit: float) -> Tensor:
        """Matrices of several shapes as one batch, with ``unit`` on the diagonal beside them."""
        dtype, (rows, columns) = computing_dtype(points[0].dtype), self._padded or (0, 0)
        batch = points[0].new_zeros(sum(self._sizes), rows, columns, dtype=dtype)
        corners, beside = [], []
        for part, x in zip(torch.split(batch, self._sizes), points, strict=True):
            n, k = x.shape[-2:]
            corners.append(part[:, :n, :k])
            beside.append(part[:, n:, k:].diagonal(dim1=-2, dim2=-1))
        copy_all_(corners, [x.reshape(c.shape) for x, c in zip(points, corners, strict=True)])
        add_to_all_(beside, unit)
        return batch

    def _write_back_(
        self, targets: Sequence[Tensor], value: Tensor, shapes: Sequence[torch.Size]
    ) -> None:
        ndim = self.constraint.set.point_ndim
        parts = torch.split(value, [math.prod(self._shape_of(s)[: -ndim or None]) for s in shapes])
        if self._padded is not None:
            sizes = [self._shape_of(shape)[-2:] for shape in shapes]
            parts = tuple(x[:, :n, :k] for x, (n, k) in zip(parts, sizes, strict=True))
        values = [
            self.constraint.back(part.reshape(self._shape_of(shape)), shape)
            for part, shape in zip(parts, shapes, strict=True)
        ]
        if self.placing == "whole":
            values = [
                local(distribute_like(v.to(x.dtype), x))
                for v, x in zip(values, targets, strict=True)
            ]
        copy_all_([local(x) for x in targets], values)

    def _shape_of(self, shape: torch.Size) -> torch.Size:
        return self.constraint.shape_of_points(shape) if self.constraint.view else shape

    def _total(self, gram: Tensor) -> Tensor:
        """The sum over the ranks that hold other rows."""
        param: Any = self.members[0].parameter
        for dim, placement in enumerate(param.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(gram, group=param.device_mesh.get_group(dim))
        return gram

    def statuses(self) -> list[list[int]]:
        """For each member, the code of each of its points; waits for the device."""
        if self.status is None:
            return [[] for _ in self.members]
        return [part.tolist() for part in torch.split(self.status.flatten(), self._sizes)]


@final
class Later:
    """A small result that the host reads when it is there, without making the device wait."""

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._event: Any = None

    def post(self, value: Tensor) -> None:
        """Start the way of ``value`` to the host."""
        if value.device.type != "cuda":
            self._value, self._event = value, None
            return
        self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        self._value.copy_(value, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def read(self, *, wait: bool) -> Tensor | None:
        """What was posted last; None before the first, or where it is still on its way."""
        if self._event is not None:
            if not wait and not self._event.query():
                return None
            self._event.synchronize()
        return self._value
