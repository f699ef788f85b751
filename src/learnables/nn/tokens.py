"""Learned vectors that stand in a sequence among the embedded ones.

Shapes: B batch, N tokens, D dim.
"""

from typing import final

import torch
from torch import Tensor

from learnables.declare import parameter
from learnables.init.base import Init
from learnables.init.random import trunc_normal
from learnables.nn.component import Component


@final
class ClassToken(Component):
    """One learned token in front of a sequence; its output is what a classifier reads.

    Parameters:
        tokens (1, 1, D): ``trunc_normal(0.02)``, as in DINOv3; DINOv2 and timm start at 1e-6, and
            ``randn``, which many write by hand, is fifty times the size of a patch embedding's
            initial scale. No decay: a convention that timm follows and DINOv2 does not.

    Args:
        dim: D.
        init: Another initialiser.

    Source:
        Dosovitskiy et al., *An Image is Worth 16x16 Words*, arXiv:2010.11929.

    Example:
        >>> import learnables as ln
        >>> ln.nn.ClassToken(8)(torch.zeros(2, 16, 8)).shape
        torch.Size([2, 17, 8])
    """

    def __init__(self, dim: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.tokens = parameter(
            1, 1, dim, init=init or trunc_normal(0.02), weight_decay=False, tags=("token",)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, 1 + N, D), in the dtype of ``x``."""
        return _prepend(self.tokens, x)


@final
class RegisterTokens(Component):
    """Learned tokens in front of a sequence that give attention a place to work, and are not read.

    Leave them out of pooling: ``x[:, registers.num_tokens:]``.

    Parameters:
        tokens (1, R, D): ``trunc_normal(0.02)``. No decay.

    Args:
        num_tokens: R; 4 in the paper.
        dim: D.
        init: Another initialiser.

    Source:
        Darcet et al., *Vision Transformers Need Registers*, arXiv:2309.16588.

    Example:
        >>> import learnables as ln
        >>> ln.nn.RegisterTokens(4, 8)(torch.zeros(2, 16, 8)).shape
        torch.Size([2, 20, 8])
    """

    def __init__(self, num_tokens: int, dim: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.tokens = parameter(
            1, num_tokens, dim, init=init or trunc_normal(0.02), weight_decay=False, tags=("token",)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, R + N, D), in the dtype of ``x``."""
        return _prepend(self.tokens, x)


def _prepend(tokens: Tensor, x: Tensor) -> Tensor:
    return torch.cat([tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
