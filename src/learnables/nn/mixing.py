"""Learned weights between the layers of a model.

Shapes: L layers.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from learnables.declare import parameter
from learnables.errors import ShapeError
from learnables.init.base import Init
from learnables.init.fixed import arange, ones, zeros
from learnables.nn.component import Component, wide


@final
class LayerMix(Component):
    """A learned weighted mean of the outputs of several layers, times one learned factor.

    Parameters:
        logits (L): zeros; the weights are their softmax, 1/L at first. No decay, though toward
            equal weights it would be harmless.
        gamma (1): ones. No decay.

    Args:
        num_layers: L.
        init: Another initialiser of the logits.

    Source:
        Peters et al., *Deep contextualized word representations* (ELMo), arXiv:1802.05365.

    Example:
        >>> import learnables as ln
        >>> ln.nn.LayerMix(2)([torch.zeros(3), torch.ones(3)])
        tensor([0.5000, 0.5000, 0.5000], grad_fn=<MulBackward0>)
    """

    def __init__(self, num_layers: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.logits = parameter(
            num_layers,
            init=init or zeros(),
            weight_decay=False,
            tags=("mixing", "fp32"),
        )
        self.gamma = parameter(1, init=ones(), weight_decay=False, tags=("mixing", "fp32"))

    def forward(self, layers: Sequence[Tensor] | Tensor) -> Tensor:
        """L tensors of one shape, or one (L, …) → one of that shape and dtype.

        Raises:
            ShapeError: Another number of layers.
        """
        if len(layers) != self.num_layers:
            raise ShapeError(
                "the mix has one weight for each layer",
                found=f"{len(layers)} layers",
                wanted=f"{self.num_layers}",
            )
        weights = wide(self.logits).softmax(0).to(layers[0].dtype)
        # One layer at a time: stacking would hold all of them twice.
        mixed = weights[0] * layers[0]
        for i in range(1, self.num_layers):
            mixed = torch.addcmul(mixed, weights[i], layers[i])
        return mixed * self.gamma.to(mixed.dtype)


@final
class ResidualMix(Component):
    """The residual stream times one learned number, plus the embedding times another.

    Parameters:
        lambdas (2): (1, 0), a plain residual stream. No decay.

    Args:
        init: Another initialiser.

    Source:
        Jordan et al., *modded-nanogpt*, 2024.

    Example:
        >>> import learnables as ln
        >>> x, embedding = torch.ones(3), torch.randn(3)
        >>> torch.equal(ln.nn.ResidualMix()(x, embedding), x)
        True
    """

    def __init__(self, *, init: Init | None = None) -> None:
        super().__init__()
        self.lambdas = parameter(
            2,
            init=init or arange(1, -1),
            weight_decay=False,
            tags=("mixing", "fp32"),
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """λ₀ x + λ₁ · embedding, in the dtype of ``x``."""
        stream, first = self.lambdas.to(x.dtype)
        mixed: Tensor = stream * x + first * embedding
        return mixed
