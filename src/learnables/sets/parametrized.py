"""Enforcement on access, through torch's own parametrizations."""

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from learnables.entries import Entry
from learnables.errors import ConstraintError
from learnables.notes import note_of, put_note
from learnables.sets.base import can_look, computing_dtype, full_precision, may_be_written
from learnables.sets.constraint import Constraint

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@final
class OnTheSet(nn.Module):
    """The parametrization that ``ln.constrain(…, how="parametrize")`` registers.

    On the first access after a change it brings ``original`` itself back into the set, so that
    ``original`` is always the weight; later accesses cost one sum. (On an accelerator, where
    looking would make it wait, every access projects; ``torch.nn.utils.parametrize.cached()``
    makes it one for a forward.) The gradient that reaches
    ``original`` is the tangent part: at a point of the set the closed-form derivative of the
    projection. Weight decay, a copy or an average of ``original`` therefore do no harm: whatever
    they leave is projected again. A lazy constraint looks at a cheap estimate first and leaves
    what is near enough; where looking would wait, it projects.

    Args:
        constraint: Where the value is kept.

    Attributes:
        enforced: How often a changed value was projected.
        skipped: How often the estimate of a lazy constraint made that unnecessary.
    """

    def __init__(self, constraint: Constraint) -> None:
        super().__init__()
        self.constraint = constraint
        self.enforced = self.skipped = 0
        self._seen: tuple[int, ...] | None = None

    def forward(self, original: Tensor) -> Tensor:
        """``original``, in the set; same shape, dtype and device."""
        if self._seen is None or self._seen != _state(original):
            with torch.no_grad(), full_precision(original.device):
                self._enforce_(original)
            self._seen = _state(original)
        result: Tensor = _Tangent.apply(original, self.constraint)  # type: ignore[no-untyped-call]
        return result

    def _enforce_(self, original: Tensor) -> None:
        of, points = self.constraint.set, self.constraint.points(original.detach())
        if can_look(points):
            if self._is_near_enough(points.to(computing_dtype(points.dtype))):
                self.skipped += 1
                return
            self.enforced += 1
            is_there = may_be_written(points) and points.data_ptr() == original.data_ptr()
            if is_there and of.enforce_([points]) is not None:
                return
        value, _ = of.enforce(points.to(computing_dtype(points.dtype)))
        if value is not points:
            original.copy_(self.constraint.back(value, original.shape))

    def _is_near_enough(self, points: Tensor) -> bool:
        lazy = self.constraint.lazy
        if lazy is None:
            return False
        directions = torch.Generator().manual_seed(self.enforced + self.skipped)
        return bool(self.constraint.set.estimate(points, directions).amax() <= lazy)

    def right_inverse(self, value: Tensor) -> Tensor:
        """The nearest point: what assigning to the parameter does."""
        self._seen = None
        return self.constraint.project(value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}  # an address means nothing in a copy

    def extra_repr(self) -> str:
        """The constraint."""
        return repr(self.constraint)


def _state(x: Tensor) -> tuple[int, ...] | None:
    """Equal for two looks at ``x`` where nothing was written in between; None where unknowable.

    Torch's version counter does not see fused optimizers, nor writes through ``.data``, so the
    bits are summed as well; that would make an accelerator wait.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return None
    bits = torch.view_as_real(x) if x.is_complex() else x
    bits = bits.detach()
    # As whole words where they fit: a sum of smaller ones is widened one by one.
    size = bits.element_size()
    begin, row = bits.storage_offset() * size, (bits.shape[-1] if bits.ndim else 0) * size
    wide = row and row % 8 == begin % 8 == 0 and bits.is_contiguous()
    whole = bits.view(torch.int64 if wide else _BITS[size])
    return (x.data_ptr(), x._version, int(whole.sum()))


class _Tangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, constraint: Constraint) -> Tensor:
        ctx.save_for_backward(x)
        ctx.constraint = constraint
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        constraint: Constraint = ctx.constraint
        wide = computing_dtype(x.dtype)
        points = constraint.points(x)
        if can_look(x) and may_be_written(points) and g.dtype == x.dtype:
            tangent = constraint.points(g).clone(memory_format=torch.contiguous_format)
            if may_be_written(tangent) and constraint.set.to_tangent_([points], [tangent]):
                return constraint.back(tangent, x.shape), None
        with full_precision(x.device):
            tangent = constraint.set.tangent(
                constraint.points(x).to(wide), constraint.points(g).to(wide)
            )
        return constraint.back(tangent, x.shape).to(g.dtype), None


def is_parametrized(entry: Entry) -> bool:
    """Whether the entry is the ``original`` of some parametrization."""
    return isinstance(entry.owner, parametrize.ParametrizationList)


def parametrize_(entry: Entry, constraint: Constraint) -> None:
    """Register the parametrization; the Parameter stays the same object, as ``original``.

    The note goes with the Parameter to its new owner, so that its other policies still hold.

    Raises:
        ConstraintError: The parameter is shared, and its other name would be cut off.
    """
    if len(entry.places) > 1:
        raise ConstraintError(
            "a shared parameter cannot be parametrized: its other name would be cut off",
            where=", ".join(entry.names),
            found='how="parametrize"',
            wanted='how="project" or "tangent", which leave the Parameter where it is',
        )
    owner, local_name = entry.owner, entry.local_name
    parametrize.register_parametrization(owner, local_name, OnTheSet(constraint))
    put_note(getattr(owner.parametrizations, local_name), "original", note_of(owner, local_name))


def parametrizations(model: nn.Module) -> list[tuple[nn.Module, str, OnTheSet]]:
    """Owner, name and parametrization of every parameter that ours is the only one of."""
    found = []
    for module in model.modules():
        lists = getattr(module, "parametrizations", None)
        if not isinstance(lists, nn.ModuleDict):
            continue
        for name, chain in lists.items():
            steps = list(chain.children())
            if len(steps) == 1 and isinstance(steps[0], OnTheSet):
                found.append((module, name, steps[0]))
    return found


def bake(model: nn.Module) -> nn.Module:
    """Replace each of our parametrizations by the plain Parameter with its value, in place.

    For export and inference; the state dict has plain keys again.

    Returns:
        ``model``.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> _ = ln.constrain(model, "weight", ln.sets.Orthogonal(), how="parametrize")
        >>> sorted(ln.sets.bake(model).state_dict())
        ['bias', 'weight']
    """
    for owner, name, _ in parametrizations(model):
        parametrize.remove_parametrizations(owner, name, leave_parametrized=True)
    return model
