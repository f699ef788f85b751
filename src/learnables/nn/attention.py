"""Learned pieces of an attention: mixing of heads, sinks, the λ of differential attention.

Shapes: B batch, H heads, N queries, M keys, d head dim.
"""

from typing import final

import torch
from torch import Tensor

from learnables.declare import parameter
from learnables.init.base import Init
from learnables.init.fixed import identity, zeros
from learnables.init.random import normal
from learnables.nn.component import Component, wide


@final
class HeadMixing(Component):
    """Attention maps mixed across heads by one learned matrix.

    Parameters:
        matrix (H, H): identity; row = head in, column = head out. Decays *toward the identity*:
            toward 0 it would switch attention off.

    Args:
        num_heads: H.
        init: Another initialiser; DeepViT ports draw with std 1.

    Source:
        Zhou et al., *DeepViT* (its re-attention), arXiv:2103.11886; Shazeer et al., *Talking-Heads
        Attention*, arXiv:2003.02436.

    Example:
        >>> import learnables as ln
        >>> attention = torch.rand(2, 4, 3, 3)
        >>> torch.allclose(ln.nn.HeadMixing(4)(attention), attention)
        True
    """

    def __init__(self, num_heads: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.matrix = parameter(
            num_heads,
            num_heads,
            init=init or identity(),
            weight_decay="init",
            role="projection",
        )

    def forward(self, attention: Tensor) -> Tensor:
        """(B, H, N, M) → (B, H, N, M), in the dtype of ``attention``."""
        return torch.einsum("bhnm,hg->bgnm", attention, self.matrix.to(attention.dtype))


@final
class AttentionSinks(Component):
    """Softmax over the keys and one learned logit for each head: attention may go nowhere.

    Computed in fp32; the weights of a row sum to less than 1.

    Parameters:
        logits (H): normal with std 0.02. No decay.

    Args:
        num_heads: H.
        init: Another initialiser.

    Source:
        Xiao et al., *Efficient Streaming Language Models with Attention Sinks*, arXiv:2309.17453;
        OpenAI, *gpt-oss*, arXiv:2508.10925.

    Example:
        >>> import learnables as ln
        >>> sinks = ln.nn.AttentionSinks(4, init=ln.init.zeros())
        >>> sinks(torch.zeros(1, 4, 1, 3))[0, 0]
        tensor([[0.2500, 0.2500, 0.2500]], grad_fn=<SelectBackward0>)
    """

    def __init__(self, num_heads: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.logits = parameter(
            num_heads,
            init=init or normal(0.02),
            weight_decay=False,
            tags=("scale", "fp32"),
        )

    def forward(self, logits: Tensor) -> Tensor:
        """Attention logits (B, H, N, M) → weights (B, H, N, M), in the dtype of ``logits``."""
        sink = wide(self.logits).view(-1, 1, 1).expand(*logits.shape[:-1], 1)
        return torch.cat([wide(logits), sink], dim=-1).softmax(dim=-1)[..., :-1].to(logits.dtype)


@final
class DifferentialLambda(Component):
    """How much of the second attention map differential attention takes off the first.

    λ = exp(q₁ · k₁) − exp(q₂ · k₂) + λ₀, in fp32.

    Parameters:
        q1, k1, q2, k2 (d): normal with std 0.1. No decay.

    Args:
        head_dim: d.
        start: λ₀; 0.8 − 0.6 exp(−0.3 · layer) in the paper.
        init: Another initialiser.

    Source:
        Ye et al., *Differential Transformer*, arXiv:2410.05258.

    Example:
        >>> import learnables as ln
        >>> ln.nn.DifferentialLambda(8, init=ln.init.zeros())(torch.ones(2), torch.ones(2))
        tensor([0.2000, 0.2000], grad_fn=<SubBackward0>)
    """

    def __init__(self, head_dim: int, start: float = 0.8, *, init: Init | None = None) -> None:
        super().__init__()
        self.start = start
        init = init or normal(0.1)

        def vector() -> torch.nn.Parameter:
            return parameter(head_dim, init=init, weight_decay=False, tags=("fp32",))

        self.q1, self.k1, self.q2, self.k2 = vector(), vector(), vector(), vector()

    def value(self) -> Tensor:
        """λ, shape (1), in fp32."""
        first = (wide(self.q1) * wide(self.k1)).sum(0, keepdim=True)
        second = (wide(self.q2) * wide(self.k2)).sum(0, keepdim=True)
        return first.exp() - second.exp() + self.start

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two maps (B, H, N, M) → first − λ · second, in the dtype of ``first``."""
        return first - self.value().to(first.dtype) * second


@final
class QueryValueBias(Component):
    """The bias of a joint query-key-value projection whose key part stays 0.

    A bias of the keys changes every logit of a row alike, which softmax does not see.

    Parameters:
        query (D): zeros. No decay.
        value (D): likewise.

    Args:
        dim: D.
        init: Another initialiser, for both.

    Source:
        Bao et al., *BEiT*, arXiv:2106.08254.

    Example:
        >>> import learnables as ln
        >>> ln.nn.QueryValueBias(4)(torch.ones(2, 12)).shape
        torch.Size([2, 12])
    """

    def __init__(self, dim: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.query = parameter(dim, init=init or zeros(), weight_decay=False)
        self.value = parameter(dim, init=init or zeros(), weight_decay=False)

    def forward(self, qkv: Tensor) -> Tensor:
        """(…, 3 D) → the same with the bias added, in the dtype of ``qkv``."""
        bias = torch.cat([self.query, torch.zeros_like(self.query), self.value])
        return qkv + bias.to(qkv.dtype)
