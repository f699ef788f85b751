"""Back to orthonormal columns after a step: Newton–Schulz on the Gram matrix.

With ``E = WᴴW − I`` the nearest matrix with orthonormal columns is ``W (I + E)^(−1/2)``. A value
that one optimizer step has moved has a small E, and two or three terms of the series in E reach
the accuracy of the dtype: products of matrices and nothing else, in one batch. W enters only
through its Gram matrix, so the rows may lie on several ranks as long as the Gram is summed.

Terms up to E (cubic in W) leave a defect of ¾E², terms up to E² (quintic) leave ⅝E³. The latter
is made smaller at no cost: with a = ΣE⁴/ΣE², which makes aE the multiple of E nearest to E³, the
linear term takes another ``−5/16 aE`` and leaves ⅝(E³ − aE), less than half for the spectrum of a
random step. The cubic turns a singular value above √3 into its negative with a perfect defect;
neither is used there.

On a CPU fp32 matrices go through a native kernel where it is built: one matrix at a time while it
is in the cache. `_seen` is its twin in torch.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from learnables._native import orthonormal as native
from learnables._torch import has_fast_bf16, symmetric_product
from learnables.sets.base import (
    ABOVE_TOLERANCE,
    KEPT_DEGENERATE,
    KEPT_NONFINITE,
    can_look,
)

#: Sums a Gram matrix over the ranks that hold the other rows.
Total = Callable[[Tensor], Tensor]

_NEAR = 0.9  # ‖E‖ up to which the series converges with room to spare
_PASSES = 6
_MATRIX_A_THREAD = 128  # columns from which one matrix is worth all threads
_SYMMETRIC = 256  # columns from which half the work of a product pays for calling BLAS itself
_ROUNDING = 8e-3  # of E² in bf16, relative: twice 2⁻⁸ at most where nothing cancels


def orthonormalised(x: Tensor, total: Total | None = None) -> tuple[Tensor, Tensor]:
    """The nearest matrices with orthonormal columns (rows, where wide) to ones close to them.

    Args:
        x: Shape ``(B, n, k)``, fp32 or wider, real or complex.
        total: Given where ``x`` holds some of the rows of tall matrices only.

    Returns:
        The new value of shape ``(B, n, k)``, and a status of shape ``(B,)``. A matrix with NaN, or
        one of deficient rank, is left as it is.

    Cost:
        2 products of the size of x with its Gram for a small step, 3 for a larger one (counting
        the small square of E as one). On a CPU the number of passes follows the data; where the
        host must not look (accelerators, compilers) there are always two.
    """
    if not can_look(x):
        return _unseen(x, total)
    if total is None and x.numel() and _is_native(x):
        value = x.detach().clone(memory_format=torch.contiguous_format)
        status = orthonormalise_([value])
        if status is not None:
            return value, status
    return _seen(x, total)


def orthonormalise_(xs: Sequence[Tensor]) -> Tensor | None:
    """`orthonormalised` in place, for fp32 matrices of one shape that lie in many tensors.

    Returns:
        A status for each matrix, one tensor after the other; None without the kernel, or where
        torch's own products are faster.
    """
    if not _pays(xs):
        return None
    n, k = xs[0].shape[-2:]
    threads = torch.get_num_threads()
    goal, attainable = promised(min(n, k), torch.float32), reach(min(n, k), torch.float32)
    status = native.run_(xs, near=_NEAR, attainable=attainable, goal=goal, threads=threads)
    if int(status.max()) >= native.FAR:
        matrices = [matrix for x in xs for matrix in x.detach().view(-1, n, k)]
        far = [i for i, code in enumerate(status.tolist()) if code == native.FAR]
        values, status[far] = _seen(torch.stack([matrices[i] for i in far]), None)
        for i, value in zip(far, values, strict=True):
            matrices[i].copy_(value)
    return status


def to_tangent_(xs: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
    """``G − W sym(WᴴG)`` in place for many fp32 matrices of one shape; False without the kernel."""
    if not _pays(xs):
        return False
    native.to_tangent_(xs, gradients, threads=torch.get_num_threads())
    return True


def _pays(xs: Sequence[Tensor]) -> bool:
    """Whether the kernel is there and faster; a few large matrices get all threads from torch."""
    n, k = xs[0].shape[-2:]
    count = len(xs) if xs[0].ndim == 2 else sum(x.numel() for x in xs) // (n * k)
    if not (native.available()[0] and n * k <= native.LARGEST and count):
        return False
    return torch.get_num_threads() <= count or min(n, k) < _MATRIX_A_THREAD


def _is_native(x: Tensor) -> bool:
    return x.dtype == torch.float32 and not (x.requires_grad and torch.is_grad_enabled())


def defect(x: Tensor, total: Total | None = None) -> Tensor:
    """``‖WᴴW − I‖`` of each matrix, by the shorter side. Shape ``(..., n, k)`` → ``(...)``."""
    return size_of(residual(x, total))


def size_of(x: Tensor) -> Tensor:
    """Frobenius norm of each matrix."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    return norm


def residual(x: Tensor, total: Total | None = None) -> Tensor:
    """``E = WᴴW − I`` (``WWᴴ − I`` where wide)."""
    gram = _gram(x, _is_tall(x, total))
    if total is not None:
        gram = total(gram)
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


def _gram(x: Tensor, tall: bool) -> Tensor:
    if x.ndim == 3:
        plain = not x.is_complex() and not (x.requires_grad and torch.is_grad_enabled())
        if plain and can_look(x) and min(x.shape[-2:]) >= _SYMMETRIC:
            return symmetric_product(x, tall)
        return torch.bmm(x.mH, x) if tall else torch.bmm(x, x.mH)
    return x.mH @ x if tall else x @ x.mH


def reach(k: int, dtype: torch.dtype) -> float:
    """The defect that arithmetic in ``dtype`` can be brought to for ``k`` columns."""
    return 4 * math.sqrt(k) * torch.finfo(dtype).eps


def promised(k: int, dtype: torch.dtype) -> float:
    """The defect that one call leaves at most: 1e-5 in fp32 for up to 512 columns."""
    return 84 * torch.finfo(dtype).eps * max(1.0, math.sqrt(k / 512))


def _is_tall(x: Tensor, total: Total | None) -> bool:
    return total is not None or x.shape[-2] >= x.shape[-1]


def _times(x: Tensor, p: Tensor, total: Total | None) -> Tensor:
    """``x + x p`` (``x + p x`` where wide)."""
    return torch.baddbmm(x, x, p) if _is_tall(x, total) else torch.baddbmm(x, p, x)


def _seen(x: Tensor, total: Total | None) -> tuple[Tensor, Tensor]:
    e = residual(x, total)
    size = size_of(e)
    status = torch.zeros(x.shape[0], dtype=torch.uint8)
    attainable = reach(e.shape[-1], e.dtype)
    goal = promised(e.shape[-1], e.dtype)
    worst = float(size.max()) if size.numel() else 0.0
    if not worst < _NEAR:
        return _mended(x, size, total)
    for _ in range(_PASSES):
        if worst <= attainable / 4:
            break
        if 0.75 * worst**2 <= attainable / 10:
            x = _times(x, e.mul_(-0.5), total)
            break
        square = _square(e)
        of_square = size_of(square)
        nearest = of_square.square() / size.square().clamp_min(torch.finfo(size.dtype).tiny)
        left = _left_by_quintic(size, of_square, e.shape[-1])
        if has_fast_bf16():
            left += 0.75 * _ROUNDING * float(of_square.max())
        if goal < left <= 4 * goal and e.shape[-1] >= _SYMMETRIC:
            left = 1.5 * _probed(e, square, nearest)
        linear = (-0.5 - 0.3125 * nearest)[:, None, None]
        x = _times(x, square.mul_(0.375).addcmul_(e, linear), total)
        if left <= goal:
            break
        e = residual(x, total)
        size = size_of(e)
        worst = float(size.max())
    return x, status


def _left_by_quintic(size: Tensor, square: Tensor, k: int) -> float:
    """A bound of ``⅝‖E³ − aE‖``, what terms up to E² leave, from ``‖E‖`` and ``‖E²‖``.

    Of all spectra with given Σλ² and Σλ⁴, Σλ⁶ is largest for one large λ² and the others equal
    (Cîrtoaje, *The equal variable method*, J. Inequal. Pure Appl. Math. 8, 2007).
    """
    p2, p4 = size.square(), square.square()
    beyond = 0.55 * float(p4.max())  # the next term, in E⁴
    if k == 1:
        return beyond
    rest = k - 1
    # a² + (p2 − a)² / rest = p4 for the large one
    root = (p2.square() - k * (p2.square() - rest * p4)).clamp_min(0).sqrt()
    a = torch.minimum((p2 + root) / k, p2)
    p6 = a**3 + (p2 - a) ** 3 / rest**2
    cubes = (p6 - p4.square() / p2.clamp_min(torch.finfo(p2.dtype).tiny)).clamp_min(0)
    largest = math.sqrt(math.sqrt(float(p4.max())))  # λ at most
    return 0.625 * math.sqrt(float(cubes.max())) * (1 + 0.5 * largest) + beyond


def _probed(e: Tensor, square: Tensor, nearest: Tensor) -> float:
    """``⅝(E³ − aE)`` and ¾ of what rounding did to E², seen in one direction.

    Where a spectrum is spread, sharper than a bound.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (1, e.shape[-1], 1), generator=generator).to(e.dtype) * 2 - 1
    signs = signs.expand(e.shape[0], -1, 1)
    once = torch.bmm(e, signs)
    left = 0.625 * (torch.bmm(square, once) - nearest[:, None, None] * once)
    left += 0.75 * (torch.bmm(square, signs) - torch.bmm(e, once))
    return float(size_of(left).max())


def _square(e: Tensor) -> Tensor:
    """``E²``: a small term beside E, which needs three digits at most."""
    if e.dtype != torch.float32 or e.device.type != "cpu" or not has_fast_bf16():
        return torch.bmm(e, e)
    low = e.bfloat16()
    if e.shape[-1] < _SYMMETRIC:
        return torch.bmm(low, low).float()
    square, half = torch.empty_like(low), e.shape[-1] // 2
    for whole, result in zip(low, square, strict=True):  # three blocks of four
        torch.mm(whole[:half], whole[:, :half], out=result[:half, :half])
        torch.mm(whole[:half], whole[:, half:], out=result[:half, half:])
        torch.mm(whole[half:], whole[:, half:], out=result[half:, half:])
        result[half:, :half] = result[:half, half:].mT
    return square.float()


def _mended(x: Tensor, size: Tensor, total: Total | None) -> tuple[Tensor, Tensor]:
    """Some matrices are far off or not finite: those get an exact decomposition, or are left."""
    finite = size.isfinite()
    near, far = size < _NEAR, finite & (size >= _NEAR)
    status = (~finite).to(torch.uint8) * KEPT_NONFINITE
    x = x.clone()
    if near.any():
        x[near] = _seen(x[near], total)[0]
    if far.any():
        factor, deficient = _inverse_root(x[far], total)
        status[far] = deficient.to(torch.uint8) * KEPT_DEGENERATE
        sound = far.clone()
        sound[far] = ~deficient
        if sound.any():
            x[sound] = _seen(_times(x[sound], factor[~deficient], total), total)[0]
    return x, status


def _inverse_root(x: Tensor, total: Total | None) -> tuple[Tensor, Tensor]:
    """``(WᴴW)^(−1/2) − I`` from an eigendecomposition in double, and where that has no meaning."""
    wide = x.to(torch.complex128 if x.is_complex() else torch.float64)
    gram = residual(wide, total)
    gram.diagonal(dim1=-2, dim2=-1).add_(1)
    values, vectors = torch.linalg.eigh(gram)
    smallest, largest = values[:, 0], values[:, -1]
    longest = max(x.shape[-2:])
    lost = (torch.finfo(x.dtype).eps * longest) ** 2, torch.finfo(values.dtype).eps * 4 * longest
    deficient = smallest <= largest * max(lost)
    root = values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt() - 1
    factor = (vectors * root.unsqueeze(-2).to(vectors.dtype)) @ vectors.mH
    return factor.to(x.dtype), deficient


def _unseen(x: Tensor, total: Total | None) -> tuple[Tensor, Tensor]:
    e = residual(x, total)
    k = e.shape[-1]
    size = size_of(e)
    finite = size.isfinite()
    # λmax(G) ≤ ‖G‖∞: divide by its root where the series might not converge, never otherwise.
    bound = e.abs().sum(-1).amax(-1) + 1
    shrink = torch.where(size < _NEAR, 1, bound.rsqrt())
    shrink = torch.where(finite, shrink, 1)[:, None, None]
    scaled = x * shrink
    eye = torch.eye(k, dtype=e.dtype, device=e.device)
    e = (e + eye) * shrink.square() - eye
    y = _times(scaled, torch.baddbmm(e, e, e, beta=-0.5, alpha=0.375), total)
    e = residual(y, total)
    after = size_of(e)
    y = _times(y, e * -0.5, total)
    y = torch.where(finite[:, None, None], y, x)
    goal = promised(k, e.dtype)
    status = torch.where(0.75 * after.square() > goal, ABOVE_TOLERANCE, 0)
    return y, torch.where(finite, status, KEPT_NONFINITE).to(torch.uint8)
