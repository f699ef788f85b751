"""Initialisers that keep lengths: matrices with orthonormal rows or columns."""

import math
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from torch import Tensor

from learnables.errors import ShapeError
from learnables.init.base import Initializer
from learnables.init.fans import as_read, at_centre


@final
@dataclass(frozen=True, repr=False)
class orthogonal(Initializer):  # noqa: N801 - reads as torch's function of the same name
    """``gain`` times a random matrix whose rows, or columns where there are fewer, are orthonormal.

    Drawn evenly from all such matrices (Haar), in fp32 also for half precision, unitary for complex
    tensors. Leading dimensions are a batch: shape (48, 64, 64) gives 48 orthogonal matrices, where
    torch flattens it to one of (48, 4096). A convolution (four or five dimensions, or
    ``role="conv"``) is one matrix of (out, in · kernel), as in torch.

    Example:
        >>> w = orthogonal()(torch.empty(48, 8, 8))
        >>> torch.allclose(w @ w.mT, torch.eye(8).expand(48, 8, 8), atol=1e-5)
        True

    Source:
        Saxe et al., *Exact solutions to the nonlinear dynamics of learning in deep linear neural
        networks*, arXiv:1312.6120; Mezzadri, *How to generate random matrices from the classical
        compact groups*, arXiv:math-ph/0609050 for the sign of the diagonal.
    """

    gain: float = 1.0

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place.

        Raises:
            ShapeError: ``x`` has fewer than two dimensions.
        """
        if x.numel():
            haar_(x.view(_as_matrices(x.shape, role)), generator).mul_(self.gain)

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """Gain / √(the longer side)."""
        return self.gain / math.sqrt(max(1, *_as_matrices(shape, role)[-2:]))


@final
@dataclass(frozen=True, repr=False)
class delta_orthogonal(Initializer):  # noqa: N801 - named as in other libraries
    """A convolution that keeps the length of every image: orthonormal at its centre, 0 around it.

    Needs at least as many channels out as in, and odd kernel sizes; with circular padding (and, up
    to the border, with zero padding) the output is as long as the input, times ``gain``.

    Example:
        >>> conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        >>> _ = delta_orthogonal()(conv.weight)
        >>> x = torch.randn(2, 4, 5, 5)
        >>> torch.allclose(conv(x).norm(), x.norm())
        True

    Source:
        Xiao et al., *Dynamical Isometry and a Mean Field Theory of CNNs*, arXiv:1806.05393.
    """

    gain: float = 1.0

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place.

        Raises:
            ShapeError: ``x`` is no convolution weight, narrows, or has an even kernel.
        """
        if x.ndim < 3 or x.shape[0] < x.shape[1] or any(k % 2 == 0 for k in x.shape[2:]):
            raise ShapeError(
                "a delta-orthogonal weight is a convolution that does not narrow",
                found=f"shape {tuple(x.shape)}",
                wanted="(out, in, *kernel) with out ≥ in and odd kernel sizes",
                mend="ln.init.orthogonal()",
            )
        centre = torch.empty(x.shape[:2], dtype=x.dtype, device=x.device)
        haar_(centre, generator).mul_(self.gain)
        at_centre(x.zero_()).copy_(centre)

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """Gain / √(out · ∏ kernel)."""
        return self.gain / math.sqrt(max(1, shape[0] * prod(shape[2:])))


def haar_(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Fill each matrix of ``x`` (…, n, m) with orthonormal rows or columns, in place."""
    x.normal_(generator=generator)
    tall = x if x.shape[-2] >= x.shape[-1] else x.mH
    q, r = torch.linalg.qr(tall)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    # QR leaves the phases of R's diagonal free; Haar measure needs them positive (Mezzadri).
    phase = torch.where(diagonal == 0, 1, diagonal.sgn())
    q = q * phase[..., None, :]
    return x.copy_(q if tall is x else q.mH)


def _as_matrices(shape: torch.Size, role: str | None) -> tuple[int, ...]:
    """(…, n, m): the batch of matrices that a weight of this role is.

    Raises:
        ShapeError: ``shape`` has fewer than two dimensions, or not those of the role.
    """
    if len(shape) < 2:
        raise ShapeError(
            "an orthogonal matrix needs two dimensions", found=str(tuple(shape)), wanted="(…, n, m)"
        )
    if (role is None and len(shape) == 3) or as_read(shape, role) != "conv":
        return tuple(shape)
    return (shape[0], prod(shape[1:]))
