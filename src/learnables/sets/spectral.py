"""Maps that act on singular values or eigenvalues, with their gradients in closed form.

Differentiating an SVD divides by differences of singular values and fails where two agree, which
is the normal case here: an orthogonal matrix has only one. The map itself is smooth there, and its
derivative is known, so that is what runs backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Singular values or eigenvalues → their new values, and the slope of the new in the old.
Values = Callable[[Tensor], tuple[Tensor, Tensor]]


def map_singular_values(x: Tensor, values: Values, *, rotation: bool = False) -> Tensor:
    """``U f(S) Vᴴ`` for ``x = U S Vᴴ``. Shape ``(..., n, k)`` in and out.

    Args:
        x: Finite matrices.
        values: f and its slope, for singular values of shape ``(..., min(n, k))``, largest first.
        rotation: Flip the last singular value's sign where ``det x < 0``, before f sees it.

    Cost:
        One SVD; backward some five products more.

    Source:
        Noferini, *A formula for the Fréchet derivative of a generalized matrix
        function*, doi:10.1137/16M1072851.
    """
    result: Tensor = _SingularMap.apply(x, values, rotation)  # type: ignore[no-untyped-call]
    return result


def map_eigenvalues(x: Tensor, values: Values) -> Tensor:
    """``V f(Λ) Vᴴ`` for Hermitian ``x = V Λ Vᴴ``. Shape ``(..., n, n)`` in and out.

    Cost:
        One symmetric eigendecomposition; backward four products more.

    Source:
        Daleckii and Krein's theorem; Higham, *Functions of matrices*, theorem 3.11.
    """
    result: Tensor = _EigenMap.apply(x, values)  # type: ignore[no-untyped-call]
    return result


def rotation_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD with both factors' determinants equal: the last singular value carries the sign."""
    u, s, vh = torch.linalg.svd(x)
    sign = torch.linalg.det(u) * torch.linalg.det(vh)
    flip = torch.ones_like(s)
    flip[..., -1] = sign.sign()
    return u * flip.unsqueeze(-2), s * flip, vh


def divided_differences(old: Tensor, new: Tensor, slope: Tensor) -> Tensor:
    """``(fᵢ − fⱼ) / (sᵢ − sⱼ)``, and the slope where two old values agree."""
    gap = old.unsqueeze(-1) - old.unsqueeze(-2)
    size = torch.maximum(old.abs().unsqueeze(-1), old.abs().unsqueeze(-2))
    same = gap.abs() <= 8 * torch.finfo(old.dtype).eps * size
    mean = (slope.unsqueeze(-1) + slope.unsqueeze(-2)) / 2
    quotient = (new.unsqueeze(-1) - new.unsqueeze(-2)) / torch.where(same, 1, gap)
    return torch.where(same, mean, quotient)


class _SingularMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Values, rotation: bool) -> Tensor:
        u, s, vh = rotation_svd(x) if rotation else torch.linalg.svd(x, full_matrices=False)
        f, slope = values(s)
        ctx.save_for_backward(u, s, vh, f, slope)
        result: Tensor = (u * f.unsqueeze(-2).to(u.dtype)) @ vh
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        u, s, vh, f, slope = ctx.saved_tensors
        ug, gv = u.mH @ g, g @ vh.mH
        m = ug @ vh.mH
        hermitian, skew = (m + m.mH) / 2, (m - m.mH) / 2
        total = s.unsqueeze(-1) + s.unsqueeze(-2)
        sums = torch.where(
            total.abs() > torch.finfo(s.dtype).tiny, (f.unsqueeze(-1) + f.unsqueeze(-2)) / total, 0
        )
        core = hermitian * divided_differences(s, f, slope) + skew * sums
        ratio = torch.where(s.abs() > torch.finfo(s.dtype).tiny, f / s, slope)
        # Outside the two singular spaces the map is multiplication by f/s; one of both is empty.
        outside = (gv - u @ m) * ratio.unsqueeze(-2) @ vh + u @ (
            ratio.unsqueeze(-1) * (ug - m @ vh)
        )
        return u @ core @ vh + outside, None, None


class _EigenMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Values) -> Tensor:
        s, v = torch.linalg.eigh(x)
        f, slope = values(s)
        ctx.save_for_backward(s, v, f, slope)
        result: Tensor = (v * f.unsqueeze(-2).to(v.dtype)) @ v.mH
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        s, v, f, slope = ctx.saved_tensors
        core = (v.mH @ g @ v) * divided_differences(s, f, slope)
        return v @ core @ v.mH, None
