"""A linear layer whose weight is made for each sample from a condition.

Shapes: B samples, T rows of each, I in features, O out features, C condition features, H hidden
features, K bases, r rank.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from learnables.arguments import require_choice
from learnables.declare import parameter
from learnables.dynamic.cost import FORMS
from learnables.dynamic.mix import mix
from learnables.dynamic.scale import GATES, second_moment, sum_of_squares
from learnables.errors import LearnablesError, ShapeError
from learnables.init.fixed import zeros
from learnables.init.random import uniform
from learnables.nn.component import Component

KINDS = ("auto", "full", "basis", "low_rank")


@final
class DynamicLinear(Component):
    """y_b = x_b · W(c_b)ᵀ + bias: each sample has its own weight, made from its own condition.

    Every kind adds a generated part to a common weight: W(c) = W₀ + G(h), h = activation(C → H).

    * ``"full"``: G(h) = Σ_k h_k A_k, any matrix: the hyper-network. H times the parameters and the
      arithmetic of a dense layer. The (B, O, I) weights are never all there: made in pieces, and
      again in the backward pass.
    * ``"auto"``: the same function, by whichever exact form is quickest for the shape at hand, the
      one that keeps all weights included.
    * ``"basis"``: G(h) = Σ_k gate(h)_k B_k, mixtures of K matrices. K times the arithmetic.
    * ``"low_rank"``: G(h) = U(h) · V(h)ᵀ of rank r, both factors generated.

    The first output has the variance that ``nn.Linear`` would give it, whatever the kind, when the
    condition is standardised: the generator is scaled by what it really receives.

    Parameters:
        weight (O, I): W₀, uniform, with 1 − ``share`` of the variance. Decays.
        bias (O): zeros. No decay.
        hidden_weight (H, C): uniform of variance 1/C. Decays.
        hidden_bias (H): zeros. No decay.
        generator_weight (H, I, O): ``"full"`` and ``"auto"``; with the rest of the variance.
            Decays.
        gate_weight (K, H), gate_bias (K), basis_weight (K, I, O): ``"basis"``. The weights decay.
        left_weight (H, r, O), right_weight (H, I, r): ``"low_rank"``. Decay.

    Args:
        in_features: I.
        out_features: O.
        condition_features: C.
        kind: As above.
        bases: K of ``"basis"``.
        rank: r of ``"low_rank"``.
        hidden_features: H; 0 generates from the condition itself.
        activation: Of the hidden layer; a module or a function.
        gate: Of ``"basis"``: ``"softmax"``, ``"sigmoid"`` or ``"linear"``.
        base: Whether there is a common weight W₀.
        bias: Whether there is a bias.
        share: Share of the initial variance of W that is generated, in [0, 1]; 0 starts as a plain
            linear layer. Without a base it is 1.
        form: One of ``learnables.dynamic.FORMS`` instead of the quickest.
        generator: Source of randomness.
        device: Where it lives; torch's default device when None.
        dtype: Of all parameters; torch's default dtype when None.

    Raises:
        LearnablesError: An unknown kind, gate or form, a size below 1, a share outside [0, 1].

    Example:
        >>> layer = ln.nn.DynamicLinear(8, 4, condition_features=3, kind="low_rank", rank=2)
        >>> layer(torch.zeros(5, 8), torch.zeros(5, 3)).shape
        torch.Size([5, 4])
        >>> layer(torch.zeros(5, 7, 8), torch.zeros(5, 3)).shape
        torch.Size([5, 7, 4])

    Cost:
        Figures in docs/en/dynamic.md.

    Source:
        Ha, Dai, Le, *HyperNetworks*, arXiv:1609.09106; ``"basis"``: Yang et al., *CondConv*,
        arXiv:1904.04971; initial scale: Chang, Flokas, Lipson, *Principled weight initialization
        for hypernetworks* (hyperfan-in), arXiv:2312.08399.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        condition_features: int,
        kind: Literal["auto", "full", "basis", "low_rank"] = "auto",
        *,
        bases: int = 8,
        rank: int = 8,
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
        require_choice("kind", kind, KINDS)
        require_choice("gate", gate, tuple(GATES))
        require_choice("form", form, (None, *FORMS))
        check_sizes(
            in_features=in_features,
            out_features=out_features,
            condition_features=condition_features,
            bases=bases,
            rank=rank,
        )
        check_share(hidden_features, share)
        self.in_features, self.out_features = in_features, out_features
        self.condition_features, self.kind, self.form = condition_features, kind, form
        self.activation, self.gate = activation, gate
        self.bases, self.rank, self.hidden_features = bases, rank, hidden_features
        share = share if base else 1.0

        made = partial(drawn, generator=generator, device=device, dtype=dtype)
        I, O, C = in_features, out_features, condition_features  # noqa: E741 - as in the legend
        wanted = 1 / (3 * I)  # of an entry of W, as nn.Linear draws it
        self.weight = made((O, I), (1 - share) * wanted) if base else None
        self.bias = made((O,), None) if bias else None
        if hidden_features:
            self.hidden_weight = made((hidden_features, C), 1 / C)
            self.hidden_bias = made((hidden_features,), None)
        H = hidden_features or C
        power = H * (second_moment(activation) if hidden_features else 1.0)  # E[‖h‖²]
        if kind == "basis":
            self.gate_weight = made((bases, H), 1 / power)
            self.gate_bias = made((bases,), None)
            variance = share * wanted / sum_of_squares(gate, bases)
            self.basis_weight = made((bases, I, O), variance)
        elif kind == "low_rank":
            # Both factors share the scale; with share 0 the left one is zero and the right is not.
            factor = math.sqrt((share or 1.0) * wanted / rank) / power
            self.left_weight = made((H, rank, O), factor if share else 0.0)
            self.right_weight = made((H, I, rank), factor)
        else:
            self.generator_weight = made((H, I, O), share * wanted / power)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, I) or (B, T, I), with (B, C) → (B, O) or (B, T, O): sample b with its own weight.

        Raises:
            ShapeError: Another number of features, or of samples in x than in the condition.
        """
        self._check(x, condition)
        x_BTI = x if x.ndim == 3 else x.unsqueeze(1)
        y = self._generated(x_BTI, condition)
        y = y if x.ndim == 3 else y.squeeze(1)
        if self.weight is not None:
            return y + F.linear(x, self.weight, self.bias)
        return y if self.bias is None else y + self.bias

    def weights(self, condition: Tensor) -> Tensor:
        """W(c) of each sample, written out: (B, C) → (B, O, I). For looking, not for computing."""
        inputs = torch.eye(self.in_features, dtype=condition.dtype, device=condition.device)
        generated = self._generated(inputs.expand(len(condition), -1, -1), condition).mT
        return generated if self.weight is None else generated + self.weight

    def extra_repr(self) -> str:
        """Sizes and kind, as ``print(model)`` shows them."""
        detail = {"basis": f", bases={self.bases}", "low_rank": f", rank={self.rank}"}
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"condition_features={self.condition_features}, kind={self.kind!r}"
            f"{detail.get(self.kind, '')}, hidden_features={self.hidden_features}"
        )

    def _generated(self, x: Tensor, condition: Tensor) -> Tensor:
        """The generated part: (B, T, I) → (B, T, O)."""
        h = condition
        if self.hidden_features:
            h = self.activation(F.linear(condition, self.hidden_weight, self.hidden_bias))
        if self.kind == "basis":
            a = GATES[self.gate](F.linear(h, self.gate_weight, self.gate_bias))
            return self._mix(a, self.basis_weight, x)
        if self.kind == "low_rank":
            return self._mix(h, self.left_weight, self._mix(h, self.right_weight, x))
        return self._mix(h, self.generator_weight, x)

    def _mix(self, h: Tensor, bank: Tensor, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            h, bank, x = h.to(dtype), bank.to(dtype), x.to(dtype)
        forms = ("chunked", "reassociated") if self.kind == "full" else FORMS
        return mix(h, bank, x, form=self.form, forms=forms)

    def _check(self, x: Tensor, condition: Tensor) -> None:
        features = (self.in_features, self.condition_features)
        if (
            x.ndim not in (2, 3)
            or condition.ndim != 2
            or (x.shape[-1], condition.shape[-1]) != features
            or x.shape[0] != condition.shape[0]
        ):
            raise ShapeError(
                "each sample has one condition, and its own weight by it",
                found=f"x {tuple(x.shape)}, condition {tuple(condition.shape)}",
                wanted=f"x (B, {features[0]}) or (B, T, {features[0]}), "
                f"condition (B, {features[1]})",
            )


def drawn(shape: tuple[int, ...], variance: float | None, **made: Any) -> torch.nn.Parameter:
    """A uniform weight of this variance, which decays; for None a bias of zeros, which does not."""
    limit = math.sqrt(3 * (variance or 0.0))
    init = uniform(-limit, limit) if limit else zeros()
    return parameter(*shape, init=init, weight_decay=variance is not None, **made)


def check_share(hidden_features: int, share: float) -> None:
    """Refuse a negative hidden size and a share outside [0, 1].

    Raises:
        LearnablesError: One is so.
    """
    if hidden_features < 0 or not 0 <= share <= 1:
        raise LearnablesError(
            "a size or a share is out of range",
            found=f"hidden_features={hidden_features}, share={share}",
            wanted="hidden_features ≥ 0, 0 ≤ share ≤ 1",
        )


def check_sizes(**sizes: int) -> None:
    """Refuse sizes below 1.

    Raises:
        LearnablesError: One is.
    """
    for name, size in sizes.items():
        if size < 1:
            raise LearnablesError(
                "the sizes of a dynamic layer are positive",
                found=f"{name}={size}",
                wanted=f"{name} ≥ 1",
            )
