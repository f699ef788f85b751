"""Weights for many experts, and weights used as ``x @ P``.

Shapes: E experts, T tokens of one expert, I in, O out.
"""

import math
from typing import final

import torch
from torch import Tensor

from learnables.declare import parameter
from learnables.init.base import Init
from learnables.init.fixed import zeros
from learnables.init.random import normal
from learnables.init.scaled import kaiming_uniform
from learnables.nn.component import Component


@final
class ExpertBank(Component):
    """One linear layer for each expert, in one tensor and one batched product.

    Parameters:
        weight (E, I, O): as ``nn.Linear`` draws it for *one* expert, uniform in ±1/√I. torch's
            initialisers would read the stack as a convolution and come out √O times too small.
            Decays like any weight.
        bias (E, O): zeros. No decay.

    Args:
        num_experts: E.
        in_features: I.
        out_features: O.
        bias: Whether there is one.
        init: Another initialiser of the weight; its fan is that of one expert.

    Source:
        Shazeer et al., *Outrageously Large Neural Networks*, arXiv:1701.06538.

    Example:
        >>> import learnables as ln
        >>> ln.nn.ExpertBank(4, 8, 16)(torch.zeros(4, 5, 8)).shape
        torch.Size([4, 5, 16])
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        self.weight = parameter(
            num_experts,
            in_features,
            out_features,
            init=init or kaiming_uniform(a=math.sqrt(5)),
            weight_decay=True,
            role="experts",
        )
        self.bias = (
            parameter(num_experts, out_features, init=zeros(), weight_decay=False) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(E, T, I), the tokens sorted by expert → (E, T, O), in the dtype of ``x``."""
        weight = self.weight.to(x.dtype)
        if self.bias is None:
            return torch.bmm(x, weight)
        return torch.baddbmm(self.bias[:, None].to(x.dtype), x, weight)


@final
class Projection(Component):
    """A bare matrix on the last dimension, ``x @ P``, as at the end of CLIP's two towers.

    Parameters:
        weight (I, O): normal with std 1/√I. Decays like any weight; rules that go by names decay
            it or not as it happens to be called.

    Args:
        in_features: I.
        out_features: O.
        init: Another initialiser; its fan in is I.

    Source:
        Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*,
        arXiv:2103.00020.

    Example:
        >>> import learnables as ln
        >>> ln.nn.Projection(8, 4)(torch.zeros(2, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(self, in_features: int, out_features: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.weight = parameter(
            in_features,
            out_features,
            init=init or normal(in_features**-0.5),
            weight_decay=True,
            role="projection",
        )

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O), in the dtype of ``x``."""
        return x @ self.weight.to(x.dtype)
