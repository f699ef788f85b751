"""What every set can do: say the nearest point, say how far outside a point lies."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from learnables.arguments import require_as_annotated
from learnables.errors import ConstraintError, ShapeError

if TYPE_CHECKING:
    from typing_extensions import Self

KEPT_NONFINITE = 1  #: status of a point with NaN or infinity in it: left as it was
KEPT_DEGENERATE = 2  #: status of a point whose nearest point is not unique: left as it was
ABOVE_TOLERANCE = 3  #: status of a point that one call could not bring all the way


class Set(ABC):
    """A closed set of numbers, vectors or matrices, given by its nearest-point map.

    A set is an immutable object that can be printed, pickled and compared. Its points occupy the
    last ``point_ndim`` dimensions of a tensor; the dimensions before them are a batch.

    To add one, write `nearest` and `outside` and hold it to the laws in `learnables.testing`.
    Neither need care about half precision, autocast or bad values: `project` and `violation` do.
    """

    #: How many trailing dimensions one point has: 0 for numbers, 1 for vectors, 2 for matrices.
    point_ndim: ClassVar[int] = 1
    #: What `violation` measures, as a formula for messages.
    measure: ClassVar[str] = "distance"
    #: Whether complex tensors have a meaning here.
    takes_complex: ClassVar[bool] = False
    #: Whether all points have one size, so that weight decay could only be undone again.
    fixes_size: ClassVar[bool] = False
    #: Relative accuracy of `project` where it iterates; 0 where only rounding is lost.
    accuracy: ClassVar[float] = 0.0
    #: Whether `enforce` and `tangent` see a tall matrix through its Gram matrix and row by row
    #: only, and take ``total=``, which sums a Gram matrix over the ranks that hold the other rows.
    needs_only_gram: ClassVar[bool] = False

    #: Whether a matrix W lies in it exactly where W with a unit matrix beside it, on the diagonal,
    #: does, so that matrices of several shapes can be made one shape and enforced together.
    pads_with_unit: ClassVar[bool] = False

    def __new__(cls, *args: object, **kwargs: object) -> "Self":
        """Refuse an argument of another kind, by its name."""
        require_as_annotated(cls, args, kwargs)
        return super().__new__(cls)

    @abstractmethod
    def nearest(self, x: Tensor) -> Tensor:
        """The nearest point of the set; ``x`` is finite, has the right shape and ≥ 32 bits."""

    @abstractmethod
    def outside(self, x: Tensor) -> Tensor:
        """How far each point lies outside, ≥ 0; the shape is that of the batch."""

    def check(self, shape: torch.Size) -> None:  # noqa: B027 - most sets take any shape
        """Refuse a shape that holds no point of this set.

        Raises:
            ShapeError: There is none, e.g. a wide matrix where columns must be orthonormal.
        """

    def tangent(self, x: Tensor, gradient: Tensor) -> Tensor:
        """What is left of ``gradient`` when its part across the set at ``x`` is taken away.

        For a set with an inside this is the gradient itself. ``x`` lies in the set; both have at
        least 32 bits.
        """
        return gradient

    def degenerate(self, x: Tensor) -> Tensor:
        """Which points have more than one nearest point, such as the centre of a sphere."""
        return torch.zeros(x.shape[: x.ndim - self.point_ndim], dtype=torch.bool, device=x.device)

    def estimate(
        self,
        x: Tensor,
        generator: torch.Generator,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """A cheap estimate of the violation, from random directions where it is a matrix norm.

        ``total`` is given where ``x`` holds some rows of tall matrices; a set that cannot make do
        with them says infinity, and is enforced always.
        """
        if total is not None:
            return torch.full(x.shape[: x.ndim - self.point_ndim], math.inf, device=x.device)
        return self.outside(x)

    @property
    def scale(self) -> float:
        """Size of a typical point, which rounding errors are proportional to."""
        return 1.0

    def floor(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """The violation that storing a point of ``shape`` in ``dtype`` causes by itself."""
        return self.scale * torch.finfo(dtype).eps / 2

    def tolerance(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """A violation that still counts as inside: what storage and summation make of it."""
        length = max(shape[len(shape) - self.point_ndim :], default=1)
        summing = 8 * math.sqrt(length) * torch.finfo(computing_dtype(dtype)).eps
        return 4 * self.floor(shape, dtype) + self.scale * summing

    def project(self, x: Tensor) -> Tensor:
        """The point of the set nearest to ``x``, for each point in the batch.

        Differentiable. Half precision is computed in fp32 and rounded once, whatever autocast
        says. A point with NaN or infinity in it comes back as it is; the others are projected.

        Args:
            x: Any floating tensor; its last ``point_ndim`` dimensions are one point.

        Returns:
            Same shape, dtype and device.

        Raises:
            ShapeError: ``x`` has too few dimensions, or a shape without a point in the set.
            ConstraintError: ``x`` is an integer tensor, or complex where that has no meaning.

        Example:
            >>> ln.sets.Ball().project(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
            tensor([[0.6000, 0.8000],
                    [0.3000, 0.4000]])
        """
        self.accept(x)
        if x.numel() == 0:
            return x.clone()
        with full_precision(x.device):
            wide = x.to(computing_dtype(x.dtype))
            good = finite_points(wide, self.point_ndim)
            if self.point_ndim < 2:  # bad values stay in their own row there
                nearest = self.nearest(wide)
            else:
                nearest = self.nearest(wide.masked_fill(~good, 0))
            return torch.where(good, nearest, wide).to(x.dtype)

    def violation(self, x: Tensor) -> Tensor:
        """How far each point of ``x`` lies outside, in the unit of `measure`; 0 means inside.

        Args:
            x: Any floating tensor; its last ``point_ndim`` dimensions are one point.

        Returns:
            The leading dimensions of ``x``, at least fp32; NaN for a point with NaN in it.

        Raises:
            ShapeError: ``x`` has too few dimensions, or a shape without a point in the set.
            ConstraintError: ``x`` is an integer tensor, or complex where that has no meaning.

        Example:
            >>> ln.sets.Ball().violation(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
            tensor([4., 0.])
        """
        self.accept(x)
        with full_precision(x.device):
            wide = x.to(computing_dtype(x.dtype))
            good = finite_points(wide, self.point_ndim)
            if self.point_ndim == 2:  # a decomposition of NaN raises
                wide = wide.masked_fill(~good, 0)
            bad = ~per_point(good, self.point_ndim)
            return self.outside(wide).masked_fill(bad, math.nan)

    def contains(self, x: Tensor, tol: float | None = None) -> Tensor:
        """Whether each point of ``x`` lies in the set, up to ``tol``.

        Args:
            x: Any floating tensor; its last ``point_ndim`` dimensions are one point.
            tol: Largest violation that counts as inside; what the dtype can hold when None.

        Returns:
            Booleans in the leading dimensions of ``x``.

        Raises:
            ShapeError: ``x`` has too few dimensions, or a shape without a point in the set.
            ConstraintError: ``x`` is an integer tensor, or complex where that has no meaning.

        Example:
            >>> ln.sets.NonNegative().contains(torch.tensor([1.0, -1.0]))
            tensor([ True, False])
        """
        violation = self.violation(x)
        return violation <= (self.tolerance(x.shape, x.dtype) if tol is None else tol)

    def enforce(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`project` for a value that one optimizer step has moved: no autograd, no exception.

        Args:
            x: fp32 or wider, right shape; dimensions before the point are the batch.

        Returns:
            The new value, and a status for each point (0, or one of the constants above).
        """
        if self.point_ndim == 0:  # NaN passes through by itself
            return self.nearest(x), (x != x).view(torch.uint8) * KEPT_NONFINITE
        good = finite_points(x, self.point_ndim)
        status = (~per_point(good, self.point_ndim)).view(torch.uint8) * KEPT_NONFINITE
        if can_look(x) and not bool(status.any()):
            return self.nearest(x), status
        safe = x if self.point_ndim < 2 else x.masked_fill(~good, 0)
        return torch.where(good, self.nearest(safe), x), status

    def enforce_(self, xs: Sequence[Tensor]) -> Tensor | None:
        """`enforce` where the values lie, by a native kernel, without stacking and copying back.

        Args:
            xs: Tensors that pass `may_be_written`, with points of one shape.

        Returns:
            A status for each point, one tensor after the other; None where there is no kernel for
            them, and nothing was changed.
        """
        return None

    def to_tangent_(self, xs: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """`tangent` in place, by a native kernel.

        Args:
            xs: What `enforce_` takes.
            gradients: As many tensors of the same kind and shapes, which are changed.

        Returns:
            False where there is no kernel for them, and nothing was changed.
        """
        return False

    def accept(self, x: Tensor) -> None:
        """Refuse a tensor that cannot hold points of this set; its values are not looked at.

        Raises:
            ConstraintError: Its dtype has no meaning here.
            ShapeError: Its shape has none.
        """
        if not (x.is_floating_point() or (x.is_complex() and self.takes_complex)):
            raise ConstraintError(
                f"{self!r} has no meaning for this dtype",
                found=f"dtype {str(x.dtype).removeprefix('torch.')}",
                wanted="a floating dtype" + (" or a complex one" if self.takes_complex else ""),
                mend="x.float()" if not x.is_complex() else "torch.view_as_real(x)",
            )
        if x.ndim < self.point_ndim:
            raise ShapeError(
                f"{self!r} is a set of {('numbers', 'vectors', 'matrices')[self.point_ndim]}",
                found=f"shape {tuple(x.shape)}, {x.ndim} dimensions",
                wanted=f"at least {self.point_ndim}",
            )
        if self.point_ndim and 0 in x.shape[x.ndim - self.point_ndim :]:
            raise ShapeError(
                f"{self!r} has no point of this shape",
                found=f"shape {tuple(x.shape)}",
                wanted="no empty dimension within a point",
            )
        self.check(x.shape)


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 or wider: half-precision values are widened, others are left."""
    if dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        return dtype
    return torch.complex64 if dtype.is_complex else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Within, fp32 means fp32: no autocast, and no matrix products in TF32 or bf16."""
    if torch.compiler.is_compiling():  # a compiler cannot see the precision of products
        return torch.autocast(device.type, enabled=False)
    return _full_precision(device)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    autocast = torch.is_autocast_enabled(device.type)
    allowed = torch.get_float32_matmul_precision()
    try:
        if autocast:
            torch.set_autocast_enabled(device.type, False)
        if allowed != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if autocast:
            torch.set_autocast_enabled(device.type, True)
        if allowed != "highest":
            torch.set_float32_matmul_precision(allowed)


def can_look(x: Tensor) -> bool:
    """Whether the host may read a value of ``x`` without waiting for a device or a compiler."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def may_be_written(x: Tensor) -> bool:
    """Whether a native kernel may read and write the numbers of ``x``, which nobody differentiates.

    They are plain fp32 numbers of the CPU in one piece, and no compiler is looking.
    """
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.layout == torch.strided
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous()
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
    )


def finite_points(x: Tensor, point_ndim: int) -> Tensor:
    """Whether each point has only finite numbers; dimensions of a point are kept with size 1."""
    if point_ndim == 0 or x.numel() == 0:
        finite = x.isfinite()
        return finite.all(-1, True) if point_ndim else finite
    if x.is_complex():
        return finite_points(torch.view_as_real(x), point_ndim + 1).squeeze(-1)
    # The extremes of a row are finite exactly where all of it is: several times faster.
    low, high = torch.aminmax(x.flatten(x.ndim - point_ndim), dim=-1)
    good = low.isfinite() & high.isfinite()
    return good.reshape(good.shape + (1,) * point_ndim)


def per_point(x: Tensor, point_ndim: int) -> Tensor:
    """Drop the trailing dimensions of size 1 that `finite_points` keeps."""
    return x.flatten(x.ndim - point_ndim).squeeze(-1) if point_ndim else x


def length(x: Tensor, *, keepdim: bool = False) -> Tensor:
    """Euclidean length along the last dimension."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=keepdim)
    return norm


def need_square(shape: torch.Size, what: str) -> None:
    """Refuse matrices that are not square.

    Raises:
        ShapeError: Rows and columns differ in number.
    """
    if shape[-2] != shape[-1]:
        raise ShapeError(
            f"{what} is square",
            found=f"shape {tuple(shape)}",
            wanted="as many rows as columns",
        )


def positive(name: str, value: float, owner: str) -> None:
    """Refuse a size that is not a finite positive number.

    Raises:
        ConstraintError: It is not.
    """
    if not (math.isfinite(value) and value > 0):
        raise ConstraintError(
            f"{owner} needs a positive, finite {name}",
            found=f"{name}={value}",
            wanted=f"{name} > 0",
        )


def spec(constraint: Set) -> dict[str, Any]:
    """A set as plain data, for a file: its name and what it was made with.

    Example:
        >>> spec(ln.sets.Ball(radius=2.0))
        {'set': 'Ball', 'radius': 2.0}
    """
    said: dict[str, Any] = {"set": type(constraint).__name__}
    if is_dataclass(constraint):
        said.update({f.name: getattr(constraint, f.name) for f in fields(constraint)})
    return said
