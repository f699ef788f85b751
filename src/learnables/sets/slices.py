"""Different sets for different slices of one parameter."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from learnables.errors import ConstraintError, ShapeError
from learnables.sets.base import KEPT_NONFINITE, Set


@final
@dataclass(frozen=True)
class Slices(Set):
    """A product: each part of one dimension lies in a set of its own, the rest is free.

    Args:
        parts: ``(start, stop, set)`` for each part; they do not overlap.
        dim: The dimension that is cut, counted from the end: −1 cuts vectors, −2 cuts the rows of
            matrices.

    Raises:
        ConstraintError: Parts overlap or are empty, ``dim`` is not negative, or a set needs more
            dimensions than are left.

    Example:
        >>> gates = Slices(((0, 2, ln.sets.NonNegative()), (2, 4, ln.sets.Simplex())))
        >>> gates.project(torch.tensor([-1.0, 1.0, 2.0, 0.0, -5.0]))
        tensor([ 0.,  1.,  1.,  0., -5.])

    Cost:
        That of its parts, and one copy.
    """

    parts: tuple[tuple[int, int, Set], ...]
    dim: int = -1
    measure: ClassVar[str] = "worst of the parts"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(sorted(map(tuple, self.parts), key=_start)))
        ends = [0, *(stop for _, stop, _ in self.parts)]
        for (start, stop, of), end in zip(self.parts, ends, strict=False):
            if self.dim >= 0 or start < end or stop <= start or of.point_ndim > 2:
                raise ConstraintError(
                    "the parts of a parameter are disjoint pieces of one dimension",
                    found=f"parts {[part[:2] for part in self.parts]} of dim {self.dim}",
                    wanted="0 ≤ start < stop ≤ next start, and dim < 0",
                )
        ndim = max([-self.dim, *(of.point_ndim for _, _, of in self.parts)])
        object.__setattr__(self, "point_ndim", ndim)

    @property
    def scale(self) -> float:
        """The largest of the parts' scales."""
        return max((of.scale for _, _, of in self.parts), default=1.0)

    def floor(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """The worst of the parts."""
        return max(of.floor(self._cut(shape, a, b), dtype) for a, b, of in self.parts)

    def tolerance(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """The worst of the parts."""
        return max(of.tolerance(self._cut(shape, a, b), dtype) for a, b, of in self.parts)

    def check(self, shape: torch.Size) -> None:
        """Refuse a shape that a part does not fit.

        Raises:
            ShapeError: A part ends beyond the dimension, or its set refuses the shape.
        """
        last = max(stop for _, stop, _ in self.parts)
        if last > shape[self.dim]:
            raise ShapeError(
                "a part ends beyond the dimension that it cuts",
                found=f"shape {tuple(shape)}, dimension {self.dim} of size {shape[self.dim]}",
                wanted=f"at least {last}",
            )
        for start, stop, of in self.parts:
            of.check(self._cut(shape, start, stop))

    def _cut(self, shape: torch.Size, start: int, stop: int) -> torch.Size:
        sizes = list(shape)
        sizes[self.dim] = stop - start
        return torch.Size(sizes)

    def nearest(self, x: Tensor) -> Tensor:
        """Each part projected."""
        return self._joined(
            x, [of.nearest(x.narrow(self.dim, a, b - a)) for a, b, of in self.parts]
        )

    def outside(self, x: Tensor) -> Tensor:
        """The worst of the parts."""
        worst = []
        for start, stop, of in self.parts:
            part = of.outside(x.narrow(self.dim, start, stop - start))
            extra = self.point_ndim - of.point_ndim
            worst.append(part.flatten(part.ndim - extra).amax(-1) if extra else part)
        return torch.stack(worst).amax(0)

    def tangent(self, x: Tensor, gradient: Tensor, **options: Any) -> Tensor:
        """Each part's own tangent."""
        cut = [
            (x.narrow(self.dim, a, b - a), gradient.narrow(self.dim, a, b - a), of)
            for a, b, of in self.parts
        ]
        return self._joined(gradient, [of.tangent(part, g) for part, g, of in cut])

    def enforce(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each part enforced; the worst status of the parts."""
        values, worst = [], []
        for start, stop, of in self.parts:
            value, status = of.enforce(x.narrow(self.dim, start, stop - start))
            extra = self.point_ndim - of.point_ndim
            values.append(value)
            worst.append(status.flatten(status.ndim - extra).amax(-1) if extra else status)
        bad = ~x.isfinite().flatten(x.ndim - self.point_ndim).all(-1)
        status = torch.stack([*worst, bad.to(torch.uint8) * KEPT_NONFINITE]).amax(0)
        keep = bad.reshape(bad.shape + (1,) * self.point_ndim)
        return torch.where(keep, x, self._joined(x, values)), status

    def _joined(self, x: Tensor, values: list[Tensor]) -> Tensor:
        pieces, end = [], 0
        for (start, stop, _), value in zip(self.parts, values, strict=True):
            pieces += [x.narrow(self.dim, end, start - end), value]
            end = stop
        pieces.append(x.narrow(self.dim, end, x.shape[self.dim] - end))
        return torch.cat(pieces, self.dim)


def _start(part: tuple[int, int, Set]) -> int:
    return part[0]
