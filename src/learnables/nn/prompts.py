"""Learned tokens and keys that steer a model whose weights may be frozen.

Shapes: B batch, N tokens, P prompts, M memory, H heads, D dim, d head dim, L layers.
"""

import math
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from learnables.arguments import require_share
from learnables.declare import parameter
from learnables.errors import ShapeError
from learnables.init.base import Init
from learnables.init.random import trunc_normal, uniform
from learnables.nn.component import Component
from learnables.nn.resample import ResizeRows
from learnables.nn.tokens import prepend


def vpt_uniform(dim: int, patch_size: int) -> uniform:
    """Uniform in ±√(6 / (3 p² + D)): Xavier for the patch embedding that makes the other tokens."""
    bound = math.sqrt(6 / (3 * patch_size**2 + dim))
    return uniform(-bound, bound)


@final
class Prompts(Component):
    """Learned tokens between the first ``prefix`` tokens and the rest.

    A checkpoint with another number of prompts loads: surplus ones are left out, missing ones keep
    a fresh draw.

    Parameters:
        tokens (1, P, D): uniform in ±√(6 / (3 · patch_size² + D)). No decay.

    Args:
        num_prompts: P.
        dim: D.
        prefix: Number of tokens (class, registers) that stay in front.
        patch_size: Side of the patches that the other tokens come from.
        dropout: Share of prompt entries zeroed in training.
        init: Another initialiser.

    Source:
        Jia et al., *Visual Prompt Tuning*, arXiv:2203.12119 (its VPT-shallow).

    Example:
        >>> import learnables as ln
        >>> ln.nn.Prompts(5, 8, prefix=1)(torch.zeros(2, 17, 8)).shape
        torch.Size([2, 22, 8])
    """

    def __init__(
        self,
        num_prompts: int,
        dim: int,
        prefix: int = 0,
        *,
        patch_size: int = 16,
        dropout: float = 0.0,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        require_share(dropout, "dropout")
        self.num_prompts, self.prefix, self.dropout = num_prompts, prefix, dropout
        init = init or vpt_uniform(dim, patch_size)
        self.tokens = parameter(
            1,
            num_prompts,
            dim,
            init=init,
            weight_decay=False,
            resize=ResizeRows(1, init),
            tags=("prompt",),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, prefix + N, D) → (B, prefix + P + N, D), in the dtype of ``x``."""
        tokens = F.dropout(self.tokens, self.dropout, self.training)
        return _between(x[:, : self.prefix], tokens, x[:, self.prefix :])


@final
class DeepPrompts(Component):
    """Learned tokens of their own for every layer: those of layer 0 are put in, later ones replace.

    Call it before each block: ``x = prompts(x, layer)``. A checkpoint with another number of
    prompts loads: surplus ones are left out, missing ones keep a fresh draw.

    Parameters:
        tokens (L, P, D): uniform in ±√(6 / (3 · patch_size² + D)). No decay.

    Args:
        num_layers: L.
        num_prompts: P.
        dim: D.
        prefix: Number of tokens (class, registers) that stay in front.
        patch_size: Side of the patches that the other tokens come from.
        dropout: Share of prompt entries zeroed in training.
        init: Another initialiser.

    Source:
        Jia et al., *Visual Prompt Tuning*, arXiv:2203.12119 (its VPT-deep).

    Example:
        >>> import learnables as ln
        >>> prompts, x = ln.nn.DeepPrompts(2, 5, 8, prefix=1), torch.zeros(2, 17, 8)
        >>> x = prompts(x, 0)
        >>> prompts(x, 1).shape
        torch.Size([2, 22, 8])
    """

    def __init__(
        self,
        num_layers: int,
        num_prompts: int,
        dim: int,
        prefix: int = 0,
        *,
        patch_size: int = 16,
        dropout: float = 0.0,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        self.num_layers, self.num_prompts = num_layers, num_prompts
        require_share(dropout, "dropout")
        self.prefix, self.dropout = prefix, dropout
        init = init or vpt_uniform(dim, patch_size)
        self.tokens = parameter(
            num_layers,
            num_prompts,
            dim,
            init=init,
            weight_decay=False,
            resize=ResizeRows(1, init),
            tags=("prompt",),
        )

    def forward(self, x: Tensor, layer: int) -> Tensor:
        """Put in (layer 0) or replace (later) the prompts; (B, prefix + P + N, D) comes back.

        Raises:
            ShapeError: There is no such layer.
        """
        if not 0 <= layer < self.num_layers:
            raise ShapeError(
                "deep prompts have one set of tokens for each layer",
                found=f"layer={layer}",
                wanted=f"0 ≤ layer < {self.num_layers}",
            )
        tokens = F.dropout(self.tokens[layer : layer + 1], self.dropout, self.training)
        rest = self.prefix + (self.num_prompts if layer else 0)
        return _between(x[:, : self.prefix], tokens, x[:, rest:])


@final
class MemoryTokens(Component):
    """Learned tokens in front of a sequence whose outputs are read, unlike those of registers.

    Parameters:
        tokens (1, M, D): ``trunc_normal(0.02)``; x-transformers draws with std 1. No decay.

    Args:
        num_tokens: M.
        dim: D.
        init: Another initialiser.

    Source:
        Burtsev et al., *Memory Transformer*, arXiv:2006.11527.

    Example:
        >>> import learnables as ln
        >>> memory = ln.nn.MemoryTokens(3, 8)
        >>> [part.shape[1] for part in memory.split(memory(torch.zeros(2, 16, 8)))]
        [3, 16]
    """

    def __init__(self, num_tokens: int, dim: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        init = init or trunc_normal(0.02)
        self.tokens = parameter(
            1,
            num_tokens,
            dim,
            init=init,
            weight_decay=False,
            resize=ResizeRows(1, init),
            tags=("token",),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, M + N, D), in the dtype of ``x``."""
        return prepend(self.tokens, x)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M + N, D) → the memory (B, M, D) and the sequence (B, N, D), views of ``x``."""
        return x[:, : self.num_tokens], x[:, self.num_tokens :]


@final
class MemoryKeyValues(Component):
    """Learned keys and values in front of those of every sequence: prefix tuning, memory.

    Queries attend to them as to any token; no query comes from them.

    Parameters:
        keys (H, M, d): ``trunc_normal(0.02)``: attention to them starts nearly even. No decay.
        values (H, M, d): likewise, so that a pretrained model starts nearly unchanged.

    Args:
        num_heads: H.
        num_tokens: M.
        head_dim: d.
        init: Another initialiser, for both.

    Source:
        Li & Liang, *Prefix-Tuning*, arXiv:2101.00190; Sukhbaatar et al., *Augmenting Self-attention
        with Persistent Memory*, arXiv:1907.01470.

    Example:
        >>> import learnables as ln
        >>> k = v = torch.zeros(2, 4, 16, 8)
        >>> k, v = ln.nn.MemoryKeyValues(4, 3, 8)(k, v)
        >>> k.shape
        torch.Size([2, 4, 19, 8])
    """

    def __init__(
        self, num_heads: int, num_tokens: int, head_dim: int, *, init: Init | None = None
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        init = init or trunc_normal(0.02)
        shape, rule = (num_heads, num_tokens, head_dim), ResizeRows(1, init)
        self.keys = parameter(*shape, init=init, weight_decay=False, resize=rule, tags=("prompt",))
        self.values = parameter(
            *shape, init=init, weight_decay=False, resize=rule, tags=("prompt",)
        )

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Two of (B, H, N, d) → two of (B, H, M + N, d), in their dtypes."""
        keys = self.keys.to(k.dtype).expand(k.shape[0], -1, -1, -1)
        values = self.values.to(v.dtype).expand(v.shape[0], -1, -1, -1)
        return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)


def _between(front: Tensor, tokens: Tensor, back: Tensor) -> Tensor:
    return torch.cat([front, tokens.to(back.dtype).expand(back.shape[0], -1, -1), back], dim=1)
