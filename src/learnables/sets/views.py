"""Which numbers of a parameter make up one point: rows, columns, filters, heads, or a pattern."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from learnables.errors import ConstraintError, ShapeError

_SIZED = re.compile(r"(heads|qkv):(\d+)")
_GROUP = re.compile(r"\(([^()]*)\)|(\w+)")


@final
@dataclass(frozen=True)
class View:
    """A reversible way to see a parameter as a stack of points.

    =========== ==================================== ==========================================
    text        parameter                            points
    =========== ==================================== ==========================================
    ``rows``    ``(n, …)``                           ``(n, rest)``: one vector an output
    ``cols``    ``(n, …)``                           ``(rest, n)``: one vector an input
    ``conv``    ``(out, in, k, …)``                  ``(out, in·k·…)``: one matrix
    ``heads:h`` ``(h·d, …)``                         ``(h, d, rest)``: one matrix a head
    ``qkv:3``   ``(3·d, …)``                         ``(3, d, rest)``: one matrix each for q, k, v
    pattern     ``"(h d) i -> h d i, h=12"``         any split, reordering and merging
    =========== ==================================== ==========================================

    Args:
        text: One of the above.

    Raises:
        ConstraintError: The text means nothing.

    Example:
        >>> View("heads:2").points(torch.zeros(6, 5)).shape
        torch.Size([2, 3, 5])
    """

    text: str
    _pattern: "Pattern | None" = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if self.text in ("rows", "cols", "conv") or _SIZED.fullmatch(self.text):
            return
        if "->" not in self.text:
            raise ConstraintError(
                "a view of this name does not exist",
                found=f"view={self.text!r}",
                wanted='"rows", "cols", "conv", "heads:12", "qkv:3", or a pattern such as '
                '"(h d) i -> h d i, h=12"',
            )
        object.__setattr__(self, "_pattern", Pattern.read(self.text))

    @property
    def keeps_rows(self) -> bool:
        """Whether each row of the parameter stays a row, so that shards of rows are seen alike."""
        return self.text in ("rows", "conv")

    def check(self, shape: torch.Size) -> None:
        """Refuse a parameter that cannot be seen this way.

        Raises:
            ShapeError: It has too few dimensions, or sizes that do not divide.
        """
        wanted = self._wanted(shape)
        if wanted:
            raise ShapeError(
                f"the view {self.text!r} does not fit the parameter",
                found=f"shape {tuple(shape)}",
                wanted=wanted,
            )

    def _wanted(self, shape: torch.Size) -> str:
        if self._pattern is not None:
            return self._pattern.wanted(shape)
        least = {"conv": 3, "cols": 2}.get(self.text, 1)
        if len(shape) < least:
            return f"at least {least} dimensions"
        sized = _SIZED.fullmatch(self.text)
        if sized and (int(sized[2]) == 0 or shape[0] % int(sized[2])):
            return f"a first dimension that {sized[2]} divides, e.g. {tuple(self._nearest(shape))}"
        return ""

    def _nearest(self, shape: torch.Size) -> list[int]:
        parts = max(1, int(self.text.split(":")[1]))
        return [max(1, round(shape[0] / parts)) * parts, *shape[1:]]

    def points(self, x: Tensor) -> Tensor:
        """``x`` as a stack of points; shares memory with it where the strides allow."""
        if self._pattern is not None:
            return self._pattern.points(x)
        matrix = x.flatten(1) if x.ndim > 2 else x
        if self.text == "cols":
            return matrix.mT
        sized = _SIZED.fullmatch(self.text)
        return matrix.reshape(int(sized[2]), -1, *matrix.shape[1:]) if sized else matrix

    def back(self, points: Tensor, shape: torch.Size) -> Tensor:
        """The parameter of ``shape`` whose points these are; undoes `points`."""
        if self._pattern is not None:
            return self._pattern.back(points, shape)
        return (points.mT if self.text == "cols" else points).reshape(shape)


@final
@dataclass(frozen=True)
class Pattern:
    """``"(h d) i -> h d i, h=12"``, read: axes of the parameter, axes of the points, sizes."""

    left: tuple[tuple[str, ...], ...]
    right: tuple[tuple[str, ...], ...]
    sizes: Mapping[str, int]
    text: str

    @staticmethod
    def read(text: str) -> "Pattern":
        """Read a pattern.

        Raises:
            ConstraintError: An axis is on one side only, twice on a side, or has no size.
        """
        pattern, *given = text.split(",")
        left, right = (tuple(_axes(side)) for side in pattern.split("->", 1))
        sizes = {}
        for item in given:
            name, _, size = item.partition("=")
            sizes[name.strip()] = int(size) if size.strip().isdigit() else 0
        flat_left = [axis for group in left for axis in group]
        flat_right = [axis for group in right for axis in group]
        unknown = [group for group in left if sum(axis not in sizes for axis in group) > 1]
        problem = (
            "an axis stands twice on one side"
            if len({*flat_left}) < len(flat_left) or len({*flat_right}) < len(flat_right)
            else f"{sorted({*flat_left} ^ {*flat_right})} on one side only"
            if {*flat_left} != {*flat_right}
            else f"a size for {sorted({*sizes} - {*flat_left})}, which are no axes"
            if not {*sizes} <= {*flat_left} or 0 in sizes.values()
            else f"({' '.join(unknown[0])}) with more than one axis of unknown size"
            if unknown
            else ""
        )
        if problem:
            raise ConstraintError(
                "a view is a one-to-one pattern",
                found=f"view={text!r}: {problem}",
                wanted='e.g. "(h d) i -> h d i, h=12"',
            )
        return Pattern(left, right, sizes, text)

    def wanted(self, shape: torch.Size) -> str:
        """What the parameter's shape should have been; empty where it fits."""
        if len(shape) != len(self.left):
            return f"{len(self.left)} dimensions"
        for size, group in zip(shape, self.left, strict=True):
            known = math.prod(self.sizes.get(axis, 1) for axis in group)
            if size % known or (size != known and all(axis in self.sizes for axis in group)):
                return f"sizes that fit {self.text!r}; {known} does not fit {size}"
        return ""

    def _lengths(self, shape: torch.Size) -> dict[str, int]:
        lengths = dict(self.sizes)
        for size, group in zip(shape, self.left, strict=True):
            known = math.prod(self.sizes.get(axis, 1) for axis in group)
            lengths.update({axis: size // known for axis in group if axis not in self.sizes})
        return lengths

    def points(self, x: Tensor) -> Tensor:
        """Split, reorder, merge."""
        return _rearranged(x, self.left, self.right, self._lengths(x.shape))

    def back(self, points: Tensor, shape: torch.Size) -> Tensor:
        """The same from right to left."""
        return _rearranged(points, self.right, self.left, self._lengths(shape))


def _rearranged(
    x: Tensor,
    old: tuple[tuple[str, ...], ...],
    new: tuple[tuple[str, ...], ...],
    lengths: Mapping[str, int],
) -> Tensor:
    flat = [axis for group in old for axis in group]
    order = [flat.index(axis) for group in new for axis in group]
    split = x.reshape([lengths[axis] for axis in flat]).permute(order)
    return split.reshape([math.prod(lengths[axis] for axis in group) for group in new])


def _axes(side: str) -> list[tuple[str, ...]]:
    return [tuple((m[1] or m[2] or "").split()) for m in _GROUP.finditer(side)]
