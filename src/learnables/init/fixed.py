"""Initialisers that draw nothing: the same values on every call."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnables.errors import ShapeError
from learnables.init.base import Initializer


@final
@dataclass(frozen=True)
class constant(Initializer):  # noqa: N801 - reads as torch's function of the same name
    """Every entry is ``value``.

    Example:
        >>> constant(0.5)(torch.empty(2))
        tensor([0.5000, 0.5000])
    """

    value: float
    deterministic = True

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place."""
        x.fill_(self.value)

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """0: all entries are equal."""
        return 0.0


def zeros() -> constant:
    """Every entry is 0, as for biases, gates that start closed, the B of a LoRA pair."""
    return constant(0.0)


def ones() -> constant:
    """Every entry is 1, as for scales that start without effect."""
    return constant(1.0)


@final
@dataclass(frozen=True)
class identity(Initializer):  # noqa: N801 - reads as torch's function of the same name
    """``gain`` times the identity in the last two dimensions; every leading dimension is a batch.

    Rows or columns beyond the square stay 0, so that a (3, 5) matrix keeps the first 3 of 5
    inputs or outputs.

    Example:
        >>> identity()(torch.empty(2, 2))
        tensor([[1., 0.],
                [0., 1.]])
    """

    gain: float = 1.0
    deterministic = True

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place.

        Raises:
            ShapeError: ``x`` has fewer than two dimensions.
        """
        if x.ndim < 2:
            raise ShapeError(
                "an identity needs two dimensions", found=str(tuple(x.shape)), wanted="(…, n, m)"
            )
        x.zero_().diagonal(dim1=-2, dim2=-1).fill_(self.gain)

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """None: the values are not a sample of anything."""
        return None
