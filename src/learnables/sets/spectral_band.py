"""Matrices that are almost orthogonal: all singular values within a band."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.errors import ConstraintError
from learnables.sets.base import KEPT_DEGENERATE, KEPT_NONFINITE, Set, can_look
from learnables.sets.polar import Total
from learnables.sets.spectral import map_singular_values


@final
@dataclass(frozen=True)
class SpectralBand(Set):
    """Matrices with all singular values in ``[low, high]``. Shape ``(..., n, k)``.

    ``SpectralBand(0.9, 1.1)`` is "almost orthogonal"; a band around 1 keeps gradients alive
    without the rigidity of `Orthogonal`.

    Args:
        low: Smallest singular value.
        high: Largest singular value.

    Raises:
        ConstraintError: Not ``0 ≤ low < high``.

    Example:
        >>> SpectralBand(0.9, 1.1).project(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([[1.1000, 0.0000],
                [0.0000, 1.0000]])

    Cost:
        That of `SpectralBall`.

    Source:
        Jia and others, *Orthogonal deep neural networks* (singular value bounding),
        doi:10.1109/TPAMI.2019.2948352.
    """

    low: float = 0.9
    high: float = 1.1
    point_ndim: ClassVar[int] = 2
    measure: ClassVar[str] = "max(low − σ, σ − high, 0), the worst σ"
    takes_complex: ClassVar[bool] = True
    needs_only_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 <= self.low < self.high and math.isfinite(self.high)):
            raise ConstraintError(
                "a band needs two singular values in order",
                found=f"low={self.low}, high={self.high}",
                wanted="0 ≤ low < high < inf",
            )

    @property
    def scale(self) -> float:
        """``high``."""
        return self.high

    def nearest(self, x: Tensor) -> Tensor:
        """``U clamp(S, low, high) Vᴴ``."""
        return map_singular_values(x, self._clamped)

    def _clamped(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return s.clamp(self.low, self.high), ((s > self.low) & (s < self.high)).to(s.dtype)

    def outside(self, x: Tensor) -> Tensor:
        """How far the worst singular value lies outside."""
        s: Tensor = torch.linalg.svdvals(x)
        return (s - s.clamp(self.low, self.high)).abs().amax(-1)

    def enforce(self, x: Tensor, total: Total | None = None) -> tuple[Tensor, Tensor]:
        """Clips through the eigenvalues of the Gram matrix."""
        return enforce_band(x, self.low, self.high, total)


def enforce_band(
    x: Tensor, low: float, high: float, total: Total | None = None
) -> tuple[Tensor, Tensor]:
    """``W (V clamp(S) / S Vᴴ)`` from ``WᴴW = V S² Vᴴ``; singular values inside stay exactly.

    Args:
        x: Shape ``(..., n, k)``.
        low: Smallest singular value.
        high: Largest.
        total: Sums the Gram matrix over ranks that hold other rows of tall matrices.
    """
    tall = total is not None or x.shape[-2] >= x.shape[-1]
    gram = x.mH @ x if tall else x @ x.mH
    if total is not None:
        gram = total(gram)
    finite = gram.isfinite().all(-1).all(-1)
    status = (~finite).to(torch.uint8) * KEPT_NONFINITE
    if low == 0 and can_look(x) and bool((gram.abs().sum(-1).amax() <= high**2).all()):
        return x, status  # λmax ≤ ‖G‖∞
    # The Gram squares the condition number; in double precision it stays harmless.
    gram = gram.masked_fill(~finite[..., None, None], 0)
    values, vectors = torch.linalg.eigh(
        gram.to(torch.complex128 if gram.is_complex() else torch.float64)
    )
    s = values.clamp_min(0).sqrt()
    # A direction of size zero cannot be lengthened by multiplication: it is left and reported.
    lost = s <= s[..., -1:] * (torch.finfo(x.dtype).eps * 8 * s.shape[-1])
    factor = torch.where(lost, 0, s.clamp(low, high) / torch.where(lost, 1, s) - 1)
    change = ((vectors * factor.unsqueeze(-2).to(vectors.dtype)) @ vectors.mH).to(x.dtype)
    value = x + (x @ change if tall else change @ x)
    if low > 0:
        deficient = lost.any(-1) & finite
        status = torch.where(deficient, KEPT_DEGENERATE, status)
        finite = finite & ~deficient
    return torch.where(finite[..., None, None], value, x), status.to(torch.uint8)
