"""A constraint: a set, the view it acts through, and how it is enforced."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import torch
from torch import Tensor, nn

from learnables._torch import is_uninitialised
from learnables.arguments import require_as_annotated
from learnables.entries import Entry, entries
from learnables.errors import ConstraintError, LearnablesError, ShapeError, warn
from learnables.sets.base import Set, computing_dtype
from learnables.sets.views import View

How = Literal["project", "tangent", "parametrize"]
MODES = ("project", "tangent", "parametrize")
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


_PLAIN = ("view", "lazy", "momentum")


@final
@dataclass(frozen=True)
class Constraint:
    """One specification for one parameter: what `ln.constrain` writes down, `ln.parameter` takes.

    Args:
        set: Where the points lie.
        view: Which numbers make up a point; the last dimensions when None.
        how: ``"project"`` after each optimizer step; ``"tangent"`` also takes the part of the
            gradient away that would leave the set; ``"parametrize"`` on each access.
        lazy: Project only where a cheap estimate of the violation exceeds this.
        momentum: Project the optimizer's momentum to the tangent space after each step.

    Raises:
        ConstraintError: A field has a value that means nothing.

    Example:
        >>> filters = Constraint(ln.sets.Orthogonal(), view="conv", how="tangent")
        >>> float(filters.violation(filters.project(torch.randn(8, 3, 3, 3)))) < 1e-5
        True
    """

    set: Set
    view: str | None = None
    how: How = "project"
    lazy: float | None = None
    momentum: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.set, Set):
            raise ConstraintError(
                "a constraint needs a set",
                found=f"{self.set!r}",
                wanted="an instance of ln.sets.…, e.g. ln.sets.Ball()",
                mend=f"{self.set.__name__}(…)" if isinstance(self.set, type) else "",
            )
        require_as_annotated(type(self), (), {n: getattr(self, n) for n in _PLAIN})
        if self.how not in MODES:
            raise ConstraintError(
                "a constraint is enforced in one of three ways",
                found=f"how={self.how!r}",
                wanted=", ".join(map(repr, MODES)),
            )
        if self.lazy is not None and not self.lazy > 0:
            raise ConstraintError(
                "a lazy constraint needs a tolerance", found=f"lazy={self.lazy}", wanted="lazy > 0"
            )
        _ = self._view  # reads the text, so that a wrong one is refused here

    @cached_property
    def _view(self) -> View | None:
        return None if self.view is None else View(self.view)

    @property
    def fixes_size(self) -> bool:
        """Whether weight decay could only be undone again; see `Set.fixes_size`."""
        return self.set.fixes_size

    @property
    def keeps_rows(self) -> bool:
        """Whether each row of the parameter is a row of its points."""
        return self._view is None or self._view.keeps_rows

    def points(self, x: Tensor) -> Tensor:
        """A parameter as a stack of points."""
        return x if self._view is None else self._view.points(x)

    def back(self, points: Tensor, shape: torch.Size) -> Tensor:
        """A stack of points as a parameter of ``shape``."""
        return points if self._view is None else self._view.back(points, shape)

    def shape_of_points(self, shape: torch.Size) -> torch.Size:
        """The shape of the points of a parameter of ``shape``."""
        return self.points(torch.empty(shape, device="meta")).shape

    def project(self, x: Tensor) -> Tensor:
        """The nearest parameter whose points lie in the set; see `Set.project`."""
        self.check(x.shape)
        return self.back(self.set.project(self.points(x)), x.shape)

    def violation(self, x: Tensor) -> Tensor:
        """How far each point lies outside; see `Set.violation`."""
        self.check(x.shape)
        return self.set.violation(self.points(x))

    def contains(self, x: Tensor, tol: float | None = None) -> Tensor:
        """Whether each point lies in the set; see `Set.contains`."""
        self.check(x.shape)
        return self.set.contains(self.points(x), tol)

    def tolerance(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """A violation that still counts as inside."""
        return self.set.tolerance(self.shape_of_points(shape), dtype)

    def floor(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """The violation that storing in ``dtype`` causes by itself."""
        return self.set.floor(self.shape_of_points(shape), dtype)

    def check(self, shape: torch.Size) -> None:
        """Refuse a shape that the view or the set does not fit.

        Raises:
            ShapeError: With the shape of the parameter and that of its points.
        """
        if self._view is None:
            return
        self._view.check(shape)
        try:
            points = self.shape_of_points(shape)
            self.set.check(points)
        except ShapeError as error:
            raise ShapeError(
                error.what,
                found=f"shape {tuple(shape)}, seen as {tuple(points)} through {self.view!r}",
                wanted=error.wanted,
                mend=error.mend,
            ) from error

    def __repr__(self) -> str:
        said = [repr(self.set)]
        if self.view is not None:
            said.append(f"view={self.view!r}")
        if self.how != "project":
            said.append(f"how={self.how!r}")
        if self.lazy is not None:
            said.append(f"lazy={self.lazy:g}")
        if self.momentum:
            said.append("momentum=True")
        return said[0] if len(said) == 1 else f"Constraint({', '.join(said)})"


def as_constraint(declared: object) -> Constraint | None:
    """What a note says about ``constraint``, as a `Constraint`; None where it says nothing.

    Raises:
        ConstraintError: It says something that is no set.
    """
    if declared is None or isinstance(declared, Constraint):
        return declared
    return Constraint(declared)  # type: ignore[arg-type]  # refuses what is no set


def constraint_of(entry: Entry) -> Constraint | None:
    """The constraint that was declared for a parameter at any of its names.

    Raises:
        ConstraintError: Two of its names carry different ones.
    """
    found = {p.name: as_constraint(p.note.get("constraint")) for p in entry.places}
    said = {name: constraint for name, constraint in found.items() if constraint is not None}
    if len({*said.values()}) > 1:
        raise ConstraintError(
            "one shared parameter is given two constraints",
            where=", ".join(said),
            found=", ".join(f"{constraint!r} at {name}" for name, constraint in said.items()),
            wanted="one constraint for all its names",
            mend=f"ln.unconstrain(model, {entry.name!r})",
        )
    return next(iter(said.values()), None)


def constrained(model: nn.Module) -> Iterator[tuple[Entry, Constraint]]:
    """Every parameter of ``model`` that has a constraint, whoever enforces it."""
    for entry in entries(model):
        constraint = constraint_of(entry)
        if constraint is not None:
            yield entry, constraint


def call_of(of: Set) -> str:
    """The expression that makes a set, to be typed: ``ln.sets.Ball(radius=1.0)``."""
    return re.sub(r"\b([A-Z]\w*)\(", r"ln.sets.\1(", repr(of))


def admit(entry: Entry, constraint: Constraint) -> None:
    """Refuse a parameter that ``constraint`` cannot hold, in the words of its name.

    Raises:
        ConstraintError: Its dtype, or a tolerance below what its dtype can store.
        ShapeError: Its shape.
    """
    param = entry.param
    if is_uninitialised(param):
        raise ConstraintError(
            "a lazy parameter has no value to constrain yet",
            where=entry.name,
            found=type(param).__name__,
            wanted="a shape",
            mend="run the model once on a batch first",
        )
    is_filter = param.ndim > 2 and isinstance(entry.owner, _CONVOLUTIONS)
    if constraint.view is None and constraint.set.point_ndim == 2 and (param.ndim > 3 or is_filter):
        raise ShapeError(
            "it is not clear which matrix of this parameter is meant",
            where=entry.name,
            found=f"{entry.looks}, without a view",
            wanted='a view: "conv" for one (out, in·k·k) matrix, "heads:12" for one a head, …',
            mend=f'ln.constrain(model, {entry.name!r}, {call_of(constraint.set)}, view="conv")',
        )
    try:
        constraint.check(param.shape)
        constraint.set.accept(
            constraint.points(torch.empty(param.shape, dtype=param.dtype, device="meta"))
        )
    except LearnablesError as error:
        raise type(error)(
            error.what,
            where=entry.name,
            found=f"{entry.looks}; {error.found}",
            wanted=error.wanted,
            mend="" if "x" in error.mend.split(".") else error.mend,
        ) from error
    floor = constraint.floor(param.shape, param.dtype)
    if constraint.lazy is not None and constraint.lazy < floor:
        raise ConstraintError(
            "the tolerance lies below what the parameter's dtype can store",
            where=entry.name,
            found=f"lazy={constraint.lazy:g}; stored as {entry.looks}",
            wanted=f"lazy ≥ {floor:.1e}, or a wider dtype",
            mend=f"model.get_parameter({entry.name!r}).data = "
            f"model.get_parameter({entry.name!r}).data.float()",
        )
    if floor > 1e-3 * constraint.set.scale and computing_dtype(param.dtype) != param.dtype:
        warn(
            "in half precision the parameter can be kept in its set only roughly",
            where=entry.name,
            found=f"{entry.looks}: rounding alone makes {constraint.set.measure} ≈ {floor:.1e}",
            wanted="float32 parameters, under autocast where half precision is meant",
        )
