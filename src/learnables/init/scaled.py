"""Initialisers whose scale comes from the fans: so that activations or gradients keep theirs."""

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from learnables.arguments import require_number
from learnables.errors import LearnablesError
from learnables.init.base import Initializer
from learnables.init.fans import fans
from learnables.init.random import left_by_cut, normal, share, trunc_normal, uniform

Mode = Literal["fan_in", "fan_out", "fan_avg"]
Distribution = Literal["normal", "uniform", "trunc_normal"]


@final
@dataclass(frozen=True, repr=False)
class variance_scaling(Initializer):  # noqa: N801 - named as in other libraries
    """Variance ``scale / fan``, exactly, whatever the distribution.

    The others of this file are special cases: Xavier is ``(gain², "fan_avg")``, Kaiming
    ``(gain², "fan_in")``, LeCun ``(1, "fan_in")``. The fan comes from the role that
    ``ln.parameter(role=)`` declares; a stack of experts has the fan of one expert.

    Args:
        scale: Variance of the output for inputs of variance 1 (``"fan_in"``).
        mode: Which fan: of the inputs, the outputs, or the mean of both.
        distribution: ``"trunc_normal"`` is cut at two deviations and widened to make up for it.

    Example:
        >>> variance_scaling(2.0).wanted_std(torch.Size([8, 50, 10]), role="experts")
        0.2
    """

    scale: float = 1.0
    mode: Mode = "fan_in"
    distribution: Distribution = "normal"

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise LearnablesError(
                "a variance is not negative", found=f"scale={self.scale}", wanted="scale ≥ 0"
            )
        if self.mode not in ("fan_in", "fan_out", "fan_avg"):
            raise LearnablesError(
                "no such fan", found=f"mode={self.mode!r}", wanted="'fan_in', 'fan_out', 'fan_avg'"
            )
        if self.distribution not in ("normal", "uniform", "trunc_normal"):
            raise LearnablesError(
                "no such distribution",
                found=f"distribution={self.distribution!r}",
                wanted="'normal', 'uniform', 'trunc_normal'",
            )

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place."""
        std = self.wanted_std(x.shape, role=role)
        assert std is not None
        drawn: Initializer
        if self.distribution == "uniform":
            bound = math.sqrt(3) * std * share(x)
            drawn = uniform(-bound, bound)
        elif self.distribution == "trunc_normal":
            drawn = trunc_normal(std / left_by_cut(2.0), cut=2.0)
        else:
            drawn = normal(std)
        drawn.fill_(x, role=role, generator=generator)

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """√(scale / fan)."""
        fan_in, fan_out = fans(shape, role)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        return math.sqrt(self.scale / max(fan, 1))


def xavier_uniform(gain: float = 1.0) -> variance_scaling:
    """Keep the variance of activations and of gradients alike, for layers that are near linear.

    Source:
        Glorot & Bengio, *Understanding the difficulty of training deep feedforward neural
        networks*, AISTATS 2010, equation 16.
    """
    require_number(gain, "gain")
    return variance_scaling(gain**2, "fan_avg", "uniform")


def xavier_normal(gain: float = 1.0) -> variance_scaling:
    """`xavier_uniform` with a normal distribution of the same variance."""
    require_number(gain, "gain")
    return variance_scaling(gain**2, "fan_avg", "normal")


def kaiming_uniform(
    a: float = 0.0, mode: Mode = "fan_in", nonlinearity: str = "leaky_relu"
) -> variance_scaling:
    """Keep the variance of activations (or, by fan out, of gradients) through ReLU-like layers.

    Args:
        a: Negative slope of a leaky ReLU; 0 is a plain one.
        mode: ``"fan_in"`` for activations, ``"fan_out"`` for gradients.
        nonlinearity: A name that ``torch.nn.init.calculate_gain`` knows.

    Source: He et al., *Delving Deep into Rectifiers*, arXiv:1502.01852, equations 10 and 14.
    """
    return variance_scaling(_gain(nonlinearity, a) ** 2, mode, "uniform")


def kaiming_normal(
    a: float = 0.0, mode: Mode = "fan_in", nonlinearity: str = "leaky_relu"
) -> variance_scaling:
    """`kaiming_uniform` with a normal distribution of the same variance."""
    return variance_scaling(_gain(nonlinearity, a) ** 2, mode, "normal")


def lecun_normal() -> variance_scaling:
    """Variance 1 / fan in, cut at two deviations: for SELU, and for projections before a norm.

    Source:
        Klambauer et al., *Self-Normalizing Neural Networks*, arXiv:1706.02515.
    """
    return variance_scaling(1.0, "fan_in", "trunc_normal")


def _gain(nonlinearity: str, a: float) -> float:
    try:
        return nn.init.calculate_gain(nonlinearity, a)  # type: ignore[arg-type]
    except ValueError as error:
        raise LearnablesError(
            "torch knows no gain for this nonlinearity",
            found=f"nonlinearity={nonlinearity!r}",
            wanted="a name that torch.nn.init.calculate_gain takes",
            mend="ln.init.variance_scaling(gain**2)",
        ) from error
