"""Learned vectors that stand in a sequence among the embedded ones, or in place of some.

Shapes: B batch, N tokens, D dim.
"""

from typing import final

import torch
from torch import Tensor

from learnables.arguments import require_share
from learnables.declare import parameter
from learnables.errors import ShapeError
from learnables.init.base import Init
from learnables.init.fixed import zeros
from learnables.init.random import normal, trunc_normal
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
        return prepend(self.tokens, x)


@final
class DistillationToken(Component):
    """One learned token in front of a sequence; its output learns from a teacher.

    In DeiT the class token stands before it: add this one first.

    Parameters:
        tokens (1, 1, D): ``trunc_normal(0.02)``. No decay, as in timm; the authors of DeiT decay
            it on purpose: ``ln.annotate(model, "*.distill.tokens", weight_decay=True)``.

    Args:
        dim: D.
        init: Another initialiser.

    Source:
        Touvron et al., *Training data-efficient image transformers*, arXiv:2012.12877.

    Example:
        >>> import learnables as ln
        >>> x = ln.nn.DistillationToken(8)(torch.zeros(2, 16, 8))
        >>> ln.nn.ClassToken(8)(x).shape
        torch.Size([2, 18, 8])
    """

    def __init__(self, dim: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.tokens = parameter(
            1, 1, dim, init=init or trunc_normal(0.02), weight_decay=False, tags=("token",)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, 1 + N, D), in the dtype of ``x``."""
        return prepend(self.tokens, x)


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
        return prepend(self.tokens, x)


@final
class MaskToken(Component):
    """One learned vector in place of every masked token.

    A batch without a masked token gives it a gradient of zeros, not none, so that DDP finds every
    parameter used as long as this module is called.

    Parameters:
        tokens (1, 1, D): zeros, as in DINOv2; MAE draws with std 0.02. No decay, though every
            common rule decays it.

    Args:
        dim: D.
        init: Another initialiser.

    Source:
        Bao et al., *BEiT*, arXiv:2106.08254; He et al., *Masked Autoencoders Are Scalable Vision
        Learners*, arXiv:2111.06377.

    Example:
        >>> import learnables as ln
        >>> mask = torch.tensor([[True, False]])
        >>> ln.nn.MaskToken(2)(torch.ones(1, 2, 2), mask).tolist()
        [[[0.0, 0.0], [1.0, 1.0]]]
    """

    def __init__(self, dim: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.tokens = parameter(
            1, 1, dim, init=init or zeros(), weight_decay=False, tags=("token",)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, N, D) and a bool (B, N) → (B, N, D), in the dtype of ``x``.

        Raises:
            ShapeError: The mask is not one bool for each token.
        """
        if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
            raise ShapeError(
                "a mask says yes or no for each token",
                found=f"{str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}",
                wanted=f"bool of shape {tuple(x.shape[:-1])}",
            )
        return torch.where(mask[..., None], self.tokens.to(x.dtype), x)


@final
class NullCondition(Component):
    """One learned vector in place of a condition that is dropped, for classifier-free guidance.

    Parameters:
        tokens (1, D): zeros, as in unCLIP. No decay.

    Args:
        dim: D.
        probability: Share of conditions dropped at random in training, where the call does not say
            which.
        init: Another initialiser.

    Raises:
        PolicyError: ``probability`` is none.

    Source:
        Ho & Salimans, *Classifier-Free Diffusion Guidance*, arXiv:2207.12598.

    Example:
        >>> import learnables as ln
        >>> null = ln.nn.NullCondition(2)
        >>> null(torch.ones(2, 2), drop=torch.tensor([True, False])).tolist()
        [[0.0, 0.0], [1.0, 1.0]]
    """

    def __init__(self, dim: int, probability: float = 0.1, *, init: Init | None = None) -> None:
        super().__init__()
        require_share(probability, "probability")
        self.probability = probability
        self.tokens = parameter(1, dim, init=init or zeros(), weight_decay=False, tags=("token",))

    def forward(self, condition: Tensor, drop: Tensor | None = None) -> Tensor:
        """(B, …, D) → the same, with the null vector where dropped.

        Args:
            condition: One vector or sequence of vectors for each sample.
            drop: A bool for each sample, shape (B); drawn when None in training, none in eval.

        Raises:
            ShapeError: ``drop`` is not one bool for each sample.
        """
        if drop is None:
            share = self.probability if self.training else 0.0
            drop = torch.rand(condition.shape[0], device=condition.device) < share
        if drop.dtype != torch.bool or drop.shape != condition.shape[:1]:
            raise ShapeError(
                "what to drop is one bool for each sample",
                found=f"{str(drop.dtype).removeprefix('torch.')} of shape {tuple(drop.shape)}",
                wanted=f"bool of shape {tuple(condition.shape[:1])}",
            )
        where = drop.view(-1, *[1] * (condition.ndim - 1))
        return torch.where(where, self.tokens.to(condition.dtype), condition)


@final
class MarkerToken(Component):
    """One learned token behind every sequence: a separator, an end of line, an end of image.

    Behind every *row* where the tokens still form an image: (B, H, W, D) → (B, H, W + 1, D).

    Parameters:
        tokens (1, 1, D): normal with std 1/√D, the scale of the embeddings it stands among in
            LLaVA-NeXT. No decay.

    Args:
        dim: D.
        init: Another initialiser.

    Source:
        Liu et al., *LLaVA-NeXT: Improved reasoning, OCR, and world knowledge* (its
        ``image_newline``), 2024.

    Example:
        >>> import learnables as ln
        >>> ln.nn.MarkerToken(8)(torch.zeros(2, 3, 4, 8)).shape
        torch.Size([2, 3, 5, 8])
    """

    def __init__(self, dim: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.tokens = parameter(
            1, 1, dim, init=init or normal(dim**-0.5), weight_decay=False, tags=("token",)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(…, N, D) → (…, N + 1, D), in the dtype of ``x``."""
        marker = self.tokens.to(x.dtype).expand(*x.shape[:-2], 1, -1)
        return torch.cat([x, marker], dim=-2)


def prepend(tokens: Tensor, x: Tensor) -> Tensor:
    """(1, n, D) in front of each of (B, N, D), in the dtype of the latter."""
    return torch.cat([tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
