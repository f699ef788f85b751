"""Learned factors on a branch or a channel."""

from typing import final

import torch
from torch import Tensor

from learnables.declare import parameter
from learnables.init.base import Init
from learnables.init.fixed import constant
from learnables.nn.component import Component


@final
class LayerScale(Component):
    """One learned factor per channel on a residual branch, small at first.

    Parameters:
        gamma (D): constant ``value``. No decay. Wanted in fp32: in bf16, a step smaller than
            1/512 of the value is lost.

    Args:
        dim: D, the size of the last dimension.
        value: Where it starts: 1e-4 in DeiT III, 1e-5 in CaiT and DINOv2, 1e-6 in ConvNeXt.
        init: Another initialiser.

    Source:
        Touvron et al., *Going deeper with Image Transformers*, arXiv:2103.17239.

    Example:
        >>> import learnables as ln
        >>> ln.nn.LayerScale(3, value=0.1)(torch.ones(1, 2, 3))
        tensor([[[0.1000, 0.1000, 0.1000],
                 [0.1000, 0.1000, 0.1000]]], grad_fn=<MulBackward0>)
    """

    def __init__(self, dim: int, value: float = 1e-4, *, init: Init | None = None) -> None:
        super().__init__()
        self.gamma = parameter(
            dim,
            init=init or constant(value),
            weight_decay=False,
            compute_dtype=torch.float32,
            tags=("scale",),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D), in the dtype of ``x``."""
        return x * self.gamma.to(x.dtype)
