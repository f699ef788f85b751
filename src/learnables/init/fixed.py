"""Initialisers that draw nothing: the same values on every call."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnables.errors import ShapeError
from learnables.init.base import Initializer
from learnables.init.fans import as_read, at_centre


@final
@dataclass(frozen=True, repr=False)
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
@dataclass(frozen=True, repr=False)
class identity(Initializer):  # noqa: N801 - reads as torch's function of the same name
    """``gain`` times the identity in the last two dimensions; every leading dimension is a batch.

    Rows or columns beyond the square stay 0, so that a (3, 5) matrix keeps the first 3 of 5
    inputs or outputs. A convolution (four or five dimensions, or ``role="conv"``) hands every
    image through: the identity sits in the centre of its kernel, as in ``torch.nn.init.dirac_``.

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
        x.zero_()
        if x.ndim > 2 and (role or x.ndim > 3) and as_read(x.shape, role) == "conv":
            x = at_centre(x)
        x.diagonal(dim1=-2, dim2=-1).fill_(self.gain)

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """None: the values are not a sample of anything."""
        return None


@final
@dataclass(frozen=True, repr=False)
class arange(Initializer):  # noqa: N801 - reads as torch's function of the same name
    """``start, start + step, …`` along the last dimension, the same in all others.

    Example:
        >>> log(arange(1))(torch.empty(3))  # A_log of Mamba
        tensor([0.0000, 0.6931, 1.0986])
    """

    start: float = 0.0
    step: float = 1.0
    deterministic = True

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place."""
        x.copy_(torch.arange(x.shape[-1], dtype=x.dtype, device=x.device) * self.step + self.start)

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """None: the values are not a sample of anything."""
        return None


@final
@dataclass(frozen=True, repr=False)
class log(Initializer):  # noqa: N801 - named after what it does
    """The logarithm of what ``of`` gives: for parameters that are used as ``exp(parameter)``.

    Example:
        >>> from learnables.init.random import uniform
        >>> x = log(uniform(1, 16))(torch.empty(100))
        >>> bool((x.exp() >= 0.99).all() and (x.exp() <= 16.01).all())
        True
    """

    of: Initializer

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place."""
        self.of.fill_(x, role=role, generator=generator)
        x.log_()

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """None: not known in closed form for every ``of``."""
        return None


@final
@dataclass(frozen=True, repr=False)
class softplus_inverse(Initializer):  # noqa: N801 - named after what it does
    """log(eʸ − 1) of what ``of`` gives: for parameters that are used as ``softplus(parameter)``.

    Written as y + log(−expm1(−y)), which neither overflows for large y nor cancels for small.

    Example:
        >>> from learnables.init.random import log_uniform
        >>> dt_bias = softplus_inverse(log_uniform(1e-3, 1e-1))(torch.empty(100))  # Mamba
        >>> dt = nn.functional.softplus(dt_bias)
        >>> bool((dt > 0.99e-3).all() and (dt < 1.01e-1).all())
        True
    """

    of: Initializer

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place."""
        self.of.fill_(x, role=role, generator=generator)
        x.add_(torch.log(-torch.expm1(-x)))

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """None: not known in closed form for every ``of``."""
        return None
