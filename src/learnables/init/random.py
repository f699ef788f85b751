"""Initialisers that draw each entry independently, from a distribution given by numbers."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from learnables.errors import LearnablesError
from learnables.init.base import Initializer


@final
@dataclass(frozen=True, repr=False)
class uniform(Initializer):  # noqa: N801 - reads as torch's function of the same name
    """Uniform between ``low`` and ``high``; each part of a complex tensor on its own.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = uniform(-0.1, 0.1)(torch.empty(1000))
        >>> bool((x.abs() <= 0.1).all())
        True
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _in_order("uniform", self.low, self.high)

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place."""
        parts(x).uniform_(self.low, self.high, generator=generator)

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """(high − low) / √12, of a real tensor."""
        return (self.high - self.low) / math.sqrt(12)


@final
@dataclass(frozen=True, repr=False)
class normal(Initializer):  # noqa: N801 - reads as torch's function of the same name
    """Normal with standard deviation ``std`` around ``mean``.

    Example:
        >>> normal(1e-6)(torch.empty(3)).abs().max() < 1e-4
        tensor(True)
    """

    std: float = 1.0
    mean: float = 0.0

    def __post_init__(self) -> None:
        _not_negative("normal", "std", self.std)

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place."""
        parts(x).normal_(0.0, self.std * share(x), generator=generator)
        x.add_(self.mean)

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """``std``."""
        return self.std


@final
@dataclass(frozen=True, repr=False)
class trunc_normal(Initializer):  # noqa: N801 - reads as torch's function of the same name
    """Normal with standard deviation ``std``, cut off at ``mean ± cut · std``.

    The cut is relative. In torch and timm it is absolute and ±2 by default, which for a ``std`` of
    0.02 is a hundred deviations away and cuts nothing.

    Args:
        std: Standard deviation before the cut.
        mean: Centre.
        cut: Where the tails end, in standard deviations.

    Example:
        >>> x = trunc_normal(0.02)(torch.empty(1000, dtype=torch.bfloat16))
        >>> bool(x.abs().max() <= 0.0403)  # 0.04, rounded to bfloat16
        True
    """

    std: float = 0.02
    mean: float = 0.0
    cut: float = 2.0

    def __post_init__(self) -> None:
        _not_negative("trunc_normal", "std", self.std)
        if not self.cut > 0:
            raise LearnablesError("a cut is positive", found=f"cut={self.cut}", wanted="cut > 0")

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place; a complex tensor is cut in each of its parts."""
        if self.std:
            std = self.std * share(x)
            nn.init.trunc_normal_(
                parts(x), 0.0, std, -self.cut * std, self.cut * std, generator=generator
            )
        else:
            x.zero_()
        x.add_(self.mean)

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """The standard deviation that the cut leaves: 0.88 ``std`` at ``cut`` = 2."""
        return self.std * left_by_cut(self.cut)


@final
@dataclass(frozen=True, repr=False)
class log_uniform(Initializer):  # noqa: N801 - named as the others
    """Positive, with the logarithm uniform: every factor of ten is equally likely.

    For learning rates, time steps and frequencies, of which one wants all magnitudes.

    Example:
        >>> x = log_uniform(1e-3, 1e-1)(torch.empty(1000))
        >>> bool((x >= 0.9e-3).all() and (x <= 1.1e-1).all())
        True
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _in_order("log_uniform", self.low, self.high)
        if not self.low > 0:
            raise LearnablesError(
                "a log-uniform distribution is positive", found=f"low={self.low}", wanted="low > 0"
            )

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x``, a real tensor, in place."""
        x.uniform_(math.log(self.low), math.log(self.high), generator=generator).exp_()

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """√(E[x²] − E[x]²), in closed form."""
        if self.low == self.high:
            return 0.0
        spread = math.log(self.high / self.low)
        mean = (self.high - self.low) / spread
        return math.sqrt(max(0.0, (self.high**2 - self.low**2) / (2 * spread) - mean**2))


def left_by_cut(cut: float) -> float:
    """Standard deviation of a unit normal that was cut off at ±``cut``."""
    density = math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(1 - 2 * cut * density / math.erf(cut / math.sqrt(2)))


def parts(x: Tensor) -> Tensor:
    """``x``, or the real view (…, 2) of a complex one."""
    return torch.view_as_real(x) if x.is_complex() else x


def share(x: Tensor) -> float:
    """What one part has of the standard deviation of the whole."""
    return math.sqrt(0.5) if x.is_complex() else 1.0


def _in_order(name: str, low: float, high: float) -> None:
    if not low <= high:
        raise LearnablesError(
            f"{name} needs its bounds in order",
            found=f"low={low}, high={high}",
            wanted="low ≤ high",
        )


def _not_negative(name: str, field: str, value: float) -> None:
    if not value >= 0:
        raise LearnablesError(
            f"{name} needs a standard deviation", found=f"{field}={value}", wanted=f"{field} ≥ 0"
        )
