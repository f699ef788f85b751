"""Correlation matrices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learnables.sets.base import Set, can_look, need_square
from learnables.sets.spectral import divided_differences

_STEPS = 40
_HALVINGS = 30


@final
@dataclass(frozen=True)
class Correlation(Set):
    """Positive semidefinite matrices with ones on the diagonal. Shape ``(..., n, n)``.

    Example:
        >>> Correlation().project(torch.tensor([[5.0, 0.5], [0.5, 2.0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])

    Cost:
        Newton's method on the n multipliers: 3 to 8 symmetric eigendecompositions in double
        precision, and a few products each for its conjugate gradients.

    Source:
        Qi and Sun, *A quadratically convergent Newton method for computing the nearest correlation
        matrix*, doi:10.1137/050624509.
    """

    point_ndim: ClassVar[int] = 2
    measure: ClassVar[str] = "max(|diagonal − 1|, −λ₁, ‖W − Wᵀ‖/2)"
    accuracy: ClassVar[float] = 1e-8

    def check(self, shape: torch.Size) -> None:
        """Refuse what is not square.

        Raises:
            ShapeError: Rows and columns differ in number.
        """
        need_square(shape, "a correlation matrix")

    def nearest(self, x: Tensor) -> Tensor:
        """``(S + diag y)₊`` of the symmetric part S, with the y that makes the diagonal right."""
        result: Tensor = _Nearest.apply((x + x.mT) / 2)  # type: ignore[no-untyped-call]
        return result

    def outside(self, x: Tensor) -> Tensor:
        """The worst of three defects."""
        diagonal = (x.diagonal(dim1=-2, dim2=-1) - 1).abs().amax(-1)
        smallest = torch.linalg.eigvalsh((x + x.mT) / 2)[..., 0]
        skew = torch.linalg.matrix_norm(x - x.mT) / 2
        return torch.maximum(torch.maximum(diagonal, (-smallest).clamp_min(0)), skew)

    def tangent(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The symmetric part of the gradient, without its diagonal."""
        symmetric = (gradient + gradient.mT) / 2
        return symmetric - torch.diag_embed(symmetric.diagonal(dim1=-2, dim2=-1))


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, *x.shape[-2:]).double()
        y = _solve(flat)
        value, s, v = _positive_part(flat, y)
        ctx.save_for_backward(s, v)
        # Exactly one on the diagonal: scaling keeps the matrix semidefinite, shifting might not.
        size = value.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
        value = value * size.unsqueeze(-1) * size.unsqueeze(-2)
        return value.to(x.dtype).reshape(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        s, v = ctx.saved_tensors
        flat = g.reshape(v.shape).double()
        flat = (flat + flat.mT) / 2
        moved = _derivative(s, v, flat)
        y = _conjugate_gradients(_jacobian(s, v), -moved.diagonal(dim1=-2, dim2=-1))
        return _derivative(s, v, flat + torch.diag_embed(y)).to(g.dtype).reshape(g.shape)


def _positive_part(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s, v = torch.linalg.eigh(x + torch.diag_embed(y))
    value = (v * s.clamp_min(0).unsqueeze(-2)) @ v.mT
    return (value + value.mT) / 2, s, v


def _derivative(s: Tensor, v: Tensor, change: Tensor) -> Tensor:
    core = divided_differences(s, s.clamp_min(0), (s > 0).to(s.dtype))
    return v @ ((v.mT @ change @ v) * core) @ v.mT


def _jacobian(s: Tensor, v: Tensor) -> Callable[[Tensor], Tensor]:
    def times(h: Tensor) -> Tensor:
        return _derivative(s, v, torch.diag_embed(h)).diagonal(dim1=-2, dim2=-1) + 1e-12 * h

    return times


def _conjugate_gradients(times: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    """Solve ``J h = right`` for symmetric positive J; as many steps as there are unknowns."""
    seen = can_look(right)
    solution, left = torch.zeros_like(right), right.clone()
    direction, size = left.clone(), left.square().sum(-1, keepdim=True)
    goal = 1e-24 * size
    for _ in range(right.shape[-1] + 5):
        if seen and bool((size <= goal).all()):
            break
        image = times(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        length = torch.where(curvature > 0, size / torch.where(curvature > 0, curvature, 1), 0)
        solution, left = solution + length * direction, left - length * image
        new = left.square().sum(-1, keepdim=True)
        direction = (
            left + torch.where(size > 0, new / torch.where(size > 0, size, 1), 0) * direction
        )
        size = new
    return solution


def _solve(x: Tensor) -> Tensor:
    """Minimise ``½‖(x + diag y)₊‖² − Σy``, smooth and convex."""
    seen = can_look(x)
    y = 1 - x.diagonal(dim1=-2, dim2=-1)
    goal = 1e-13 * x.shape[-1] * (1 + x.abs().amax((-2, -1), keepdim=True).squeeze(-1))
    for _ in range(_STEPS):
        value, s, v = _positive_part(x, y)
        gradient = value.diagonal(dim1=-2, dim2=-1) - 1
        if seen and bool((gradient.abs() <= goal).all()):
            break
        height = _height(s, y)
        step = _conjugate_gradients(_jacobian(s, v), -gradient)
        slope = (step * gradient).sum(-1, keepdim=True)
        downhill = slope < 0
        step = torch.where(downhill, step, -gradient)
        slope = torch.where(downhill, slope, -gradient.square().sum(-1, keepdim=True))
        length = torch.ones_like(slope)
        rounding = 1e-15 * (1 + height.abs())
        for _ in range(_HALVINGS):
            trial = y + length * step
            s = torch.linalg.eigvalsh(x + torch.diag_embed(trial))
            fits = _height(s, trial) <= height + 1e-4 * length * slope + rounding
            if seen and bool(fits.all()):
                break
            length = torch.where(fits, length, length / 2)
        y = y + length * step
    return y


def _height(s: Tensor, y: Tensor) -> Tensor:
    return (s.clamp_min(0).square().sum(-1) / 2 - y.sum(-1)).unsqueeze(-1)
