"""A convolution whose kernel is mixed for each sample from a few, by a condition.

Shapes: B samples, C_in and C_out channels, k × k kernel, C condition features, H hidden features, K
bases, h × w and h' × w' image in and out.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from learnables.arguments import require_choice
from learnables.dynamic.cost import quickest_convolution
from learnables.dynamic.scale import GATES, second_moment, sum_of_squares
from learnables.errors import ShapeError
from learnables.nn.component import Component
from learnables.nn.dynamic_linear import check_share, check_sizes, drawn

_FORMS = ("materialised", "reassociated")


@final
class DynamicConv2d(Component):
    """Each sample is convolved with its own mixture of K kernels: W₀ + Σ_k gate(c)_k W_k.

    By one of two exact forms, whichever is quicker for the shape at hand: mix a kernel for each
    sample and convolve in groups (large images), or scale each sample K times and convolve all
    with all kernels at once (small images, many kernels).

    Parameters:
        weight (C_out, C_in, k, k): W₀, uniform, with 1 − ``share`` of the variance. Decays.
        bias (C_out): zeros. No decay.
        hidden_weight (H, C), hidden_bias (H), gate_weight (K, H), gate_bias (K): from condition to
            coefficients; weights uniform and decayed, biases zeros and not.
        basis_weight (K, C_out, C_in, k, k): uniform, with the rest of the variance. Decays.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: k.
        condition_features: C.
        bases: K.
        stride: Of the convolution.
        padding: Of the convolution.
        dilation: Of the convolution.
        hidden_features: H; 0 gates by the condition itself.
        activation: Of the hidden layer; a module or a function.
        gate: ``"softmax"``, ``"sigmoid"`` or ``"linear"``.
        base: Whether there is a common kernel W₀.
        bias: Whether there is a bias.
        share: Share of the initial variance of a kernel that is mixed, in [0, 1].
        form: ``"materialised"`` or ``"reassociated"`` instead of the quicker one.
        generator: Source of randomness.
        device: Where it lives; torch's default device when None.
        dtype: Of all parameters; torch's default dtype when None.

    Raises:
        LearnablesError: An unknown gate or form, a size below 1, a share outside [0, 1].

    Example:
        >>> layer = ln.nn.DynamicConv2d(3, 8, 3, condition_features=5, bases=4, padding=1)
        >>> layer(torch.zeros(2, 3, 6, 6), torch.zeros(2, 5)).shape
        torch.Size([2, 8, 6, 6])

    Source:
        Yang et al., *CondConv: conditionally parameterized convolutions*, arXiv:1904.04971.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        condition_features: int,
        bases: int = 8,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        hidden_features: int = 64,
        activation: Callable[[Tensor], Tensor] = F.relu,
        gate: Literal["softmax", "sigmoid", "linear"] = "softmax",
        base: bool = True,
        bias: bool = True,
        share: float = 0.5,
        form: str | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_choice("gate", gate, tuple(GATES))
        require_choice("form", form, (None, *_FORMS))
        check_sizes(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            condition_features=condition_features,
            bases=bases,
        )
        check_share(hidden_features, share)
        self.in_channels, self.out_channels, self.kernel_size = (
            in_channels,
            out_channels,
            kernel_size,
        )
        self.condition_features, self.bases = condition_features, bases
        self.hidden_features, self.activation, self.gate = hidden_features, activation, gate
        self.stride, self.padding, self.dilation, self.form = stride, padding, dilation, form
        share = share if base else 1.0
        made = partial(drawn, generator=generator, device=device, dtype=dtype)
        kernel = (out_channels, in_channels, kernel_size, kernel_size)
        wanted = 1 / (3 * in_channels * kernel_size**2)  # as nn.Conv2d draws it
        self.weight = made(kernel, (1 - share) * wanted) if base else None
        self.bias = made((out_channels,), None) if bias else None
        if hidden_features:
            self.hidden_weight = made((hidden_features, condition_features), 1 / condition_features)
            self.hidden_bias = made((hidden_features,), None)
        inputs = hidden_features or condition_features
        power = inputs * (second_moment(activation) if hidden_features else 1.0)
        self.gate_weight = made((bases, inputs), 1 / power)
        self.gate_bias = made((bases,), None)
        variance = share * wanted / sum_of_squares(gate, bases)
        self.basis_weight = made((bases, *kernel), variance)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, C_in, h, w), with (B, C) → (B, C_out, h', w'): sample b with its own kernel.

        Raises:
            ShapeError: Another number of channels or features, or of samples in x than in the
                condition.
        """
        self._check(x, condition)
        a = self._coefficients(condition)
        B, _, h, w = x.shape
        reach = self.dilation * (self.kernel_size - 1) + 1
        places = 1
        for size in (h, w):
            places *= max((size + 2 * self.padding - reach) // self.stride + 1, 1)
        taps = self.kernel_size**2
        form = self.form or quickest_convolution(
            B, places, self.in_channels, taps, self.out_channels, self.bases
        )
        if form == "reassociated":
            return self._reassociated(a, x)
        kernels = self.weights(condition, a)
        y = self._convolve(x.reshape(1, -1, h, w), kernels.flatten(0, 1), None, groups=B)
        y = y.view(B, self.out_channels, *y.shape[2:])
        return y if self.bias is None else y + self.bias[:, None, None]

    def weights(self, condition: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """The kernel of each sample: (B, C) → (B, C_out, C_in, k, k)."""
        a = self._coefficients(condition) if coefficients is None else coefficients
        mixed = (a @ self.basis_weight.flatten(1)).view(-1, *self.basis_weight.shape[1:])
        return mixed if self.weight is None else mixed + self.weight

    def extra_repr(self) -> str:
        """Sizes, as ``print(model)`` shows them."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"condition_features={self.condition_features}, bases={self.bases}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        )

    def _coefficients(self, condition: Tensor) -> Tensor:
        h = condition
        if self.hidden_features:
            h = self.activation(F.linear(condition, self.hidden_weight, self.hidden_bias))
        return GATES[self.gate](F.linear(h, self.gate_weight, self.gate_bias))

    def _reassociated(self, a: Tensor, x: Tensor) -> Tensor:
        """One convolution of [x, a₁x, …, a_K x] with [W₀, W₁, …, W_K]."""
        scaled = (a[:, :, None, None, None] * x[:, None]).flatten(1, 2)
        kernels = self.basis_weight.transpose(0, 1).flatten(1, 2)
        if self.weight is not None:
            scaled = torch.cat([x.to(scaled.dtype), scaled], 1)
            kernels = torch.cat([self.weight, kernels], 1)
        return self._convolve(scaled, kernels, self.bias, groups=1)

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        return F.conv2d(x, kernel, bias, self.stride, self.padding, self.dilation, groups)

    def _check(self, x: Tensor, condition: Tensor) -> None:
        if (
            x.ndim != 4
            or condition.ndim != 2
            or (x.shape[1], condition.shape[1]) != (self.in_channels, self.condition_features)
            or x.shape[0] != condition.shape[0]
        ):
            raise ShapeError(
                "each sample has one condition, and its own kernel by it",
                found=f"x {tuple(x.shape)}, condition {tuple(condition.shape)}",
                wanted=f"x (B, {self.in_channels}, h, w), condition (B, {self.condition_features})",
            )
