"""Matrices of bounded spectral norm: layers with a Lipschitz constant."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnables.sets.base import Set, positive
from learnables.sets.polar import Total
from learnables.sets.spectral import map_singular_values
from learnables.sets.spectral_band import enforce_band


@final
@dataclass(frozen=True)
class SpectralBall(Set):
    """Matrices whose singular values are at most ``radius``. Shape ``(..., n, k)``.

    The projection, not the division by the norm that ``spectral_norm`` does: singular values
    below the radius stay as they are, and a zero matrix stays zero.

    Args:
        radius: Largest singular value.

    Raises:
        ConstraintError: ``radius`` is not positive.

    Example:
        >>> SpectralBall().project(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])

    Cost:
        `project`: one SVD. The call after a step: a Gram matrix and its eigenvalues, or the Gram
        matrix alone where a bound already shows that all is inside.

    Source:
        Lewis and Malick, *Alternating projections on manifolds*, doi:10.1287/moor.1070.0291.
    """

    radius: float = 1.0
    point_ndim: ClassVar[int] = 2
    measure: ClassVar[str] = "max(σ₁ − radius, 0)"
    takes_complex: ClassVar[bool] = True
    needs_only_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("radius", self.radius, "SpectralBall")

    @property
    def scale(self) -> float:
        """``radius``."""
        return self.radius

    def nearest(self, x: Tensor) -> Tensor:
        """``U min(S, radius) Vᴴ``."""
        return map_singular_values(
            x, lambda s: (s.clamp_max(self.radius), (s < self.radius).to(s.dtype))
        )

    def outside(self, x: Tensor) -> Tensor:
        """``max(σ₁ − radius, 0)``."""
        norm: Tensor = torch.linalg.matrix_norm(x, 2)
        return (norm - self.radius).clamp_min(0)

    def enforce(self, x: Tensor, total: Total | None = None) -> tuple[Tensor, Tensor]:
        """Clips through the eigenvalues of the Gram matrix."""
        return enforce_band(x, 0.0, self.radius, total)
