"""Learned scalars on logits: scale, temperature, bias.

Shapes: B batch, H heads, N tokens.
"""

import math
from typing import Any, final

import torch
from torch import Tensor

from learnables.declare import parameter
from learnables.errors import PolicyError
from learnables.init.base import Init
from learnables.init.fixed import constant
from learnables.nn.component import Component, wide


@final
class LogitScale(Component):
    """Logits times exp(s), with exp(s) kept between 1 and ``maximum``.

    The bound acts in the forward pass and lets a gradient through only where it points back inside:
    s can stop at the bound but is never stuck behind it, as it is behind ``clamp``, whose gradient
    there is 0. Nothing has to be done after the step.

    Parameters:
        log_scale (1): ln(``value``). No decay. Shape (1) rather than (): FSDP refuses the latter.

    Args:
        value: Where exp(s) starts: 1/0.07 in CLIP, 10 in SigLIP.
        maximum: Largest exp(s); 100 in CLIP.
        init: Another initialiser, of s.

    Raises:
        PolicyError: ``value`` is not between 1 and ``maximum``.

    Source:
        Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*,
        arXiv:2103.00020; Zhai et al., *Sigmoid Loss for Language Image Pre-Training*,
        arXiv:2303.15343.

    Example:
        >>> import learnables as ln
        >>> ln.nn.LogitScale(10.0)(torch.tensor([0.5])).round(decimals=4)
        tensor([5.], grad_fn=<RoundBackward1>)
    """

    def __init__(
        self, value: float = 1 / 0.07, maximum: float = 100.0, *, init: Init | None = None
    ) -> None:
        super().__init__()
        _check_between(value, maximum)
        self.maximum = maximum
        self.log_scale = parameter(
            1,
            init=init or constant(math.log(value)),
            weight_decay=False,
            tags=("scale", "fp32"),
        )

    def scale(self) -> Tensor:
        """exp(s) within its bounds, shape (1), computed in fp32."""
        return bounded(wide(self.log_scale), 0.0, math.log(self.maximum)).exp()

    def forward(self, logits: Tensor) -> Tensor:
        """Any shape → the same, in the dtype of ``logits``."""
        return logits * self.scale().to(logits.dtype)


@final
class LogitBias(Component):
    """Logits plus one learned number, for losses in which nearly all pairs are negative.

    Parameters:
        bias (1): constant ``value``. No decay.

    Args:
        value: Where it starts; −10 in SigLIP, so that the first steps are not spent on the
            imbalance.
        init: Another initialiser.

    Source:
        Zhai et al., *Sigmoid Loss for Language Image Pre-Training*, arXiv:2303.15343.

    Example:
        >>> import learnables as ln
        >>> ln.nn.LogitBias()(torch.tensor([2.0]))
        tensor([-8.], grad_fn=<AddBackward0>)
    """

    def __init__(self, value: float = -10.0, *, init: Init | None = None) -> None:
        super().__init__()
        self.bias = parameter(1, init=init or constant(value), weight_decay=False, tags=("fp32",))

    def forward(self, logits: Tensor) -> Tensor:
        """Any shape → the same, in the dtype of ``logits``."""
        return logits + self.bias.to(logits.dtype)


@final
class Temperature(Component):
    """One learned factor for the attention logits of each head, as its logarithm.

    Bounded as in `LogitScale`. XCiT learns the factor itself and starts it at 1; the logarithm
    keeps it positive.

    Parameters:
        log_scale (H, 1, 1): ln(``value``). No decay; rules that go by the number of dimensions
            decay it.

    Args:
        num_heads: H; 1 for one factor in all.
        value: Where the factor starts: 1 in XCiT, 10 in Swin v2, 1/√d in locality self-attention.
        maximum: Largest factor; 100 in Swin v2.
        init: Another initialiser, of the logarithm.

    Raises:
        PolicyError: ``value`` is not between 0 and ``maximum``.

    Source:
        El-Nouby et al., *XCiT*, arXiv:2106.09681; Liu et al., *Swin Transformer V2*,
        arXiv:2111.09883; Lee et al., *Vision Transformer for Small-Size Datasets*,
        arXiv:2112.13492.

    Example:
        >>> import learnables as ln
        >>> ln.nn.Temperature(4, 10.0)(torch.ones(2, 4, 3, 3)).mean().round(decimals=4)
        tensor(10., grad_fn=<RoundBackward1>)
    """

    def __init__(
        self,
        num_heads: int = 1,
        value: float = 1.0,
        maximum: float = 100.0,
        *,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        _check_between(value, maximum, least=0.0)
        self.maximum = maximum
        self.log_scale = parameter(
            num_heads,
            1,
            1,
            init=init or constant(math.log(value)),
            weight_decay=False,
            tags=("scale", "fp32"),
        )

    def forward(self, logits: Tensor) -> Tensor:
        """(B, H, N, N) → (B, H, N, N), in the dtype of ``logits``."""
        s = bounded(wide(self.log_scale), -math.inf, math.log(self.maximum))
        return logits * s.exp().to(logits.dtype)


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` between ``low`` and ``high``; the gradient passes unless a step along it leads out."""
    out: Tensor = _Bounded.apply(x, low, high)  # type: ignore[no-untyped-call]
    return out


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        # A step goes against the gradient: at the upper bound only a positive one leads inside.
        out = ((x > ctx.high) & (grad < 0)) | ((x < ctx.low) & (grad > 0))
        return grad.masked_fill(out, 0), None, None


def _check_between(value: float, maximum: float, least: float = 1.0) -> None:
    good = least <= value <= maximum if least else 0 < value <= maximum
    if not good:
        raise PolicyError(
            "a scale starts within its bounds",
            found=f"value={value}, maximum={maximum}",
            wanted=f"{least:g} {'≤' if least else '<'} value ≤ maximum",
        )
