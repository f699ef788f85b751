"""Element-wise functions with learned parameters.

Shapes: B batch, C channels, D dim.
"""

from typing import final

from torch import Tensor

from learnables.declare import parameter
from learnables.init.base import Init
from learnables.init.fixed import constant, ones, zeros
from learnables.nn.component import Component, wide


@final
class DyT(Component):
    """γ tanh(α x) + β: what a LayerNorm does to large values, without its statistics.

    Parameters:
        alpha (1): constant ``value``. No decay.
        gamma (D): ones. No decay.
        beta (D): zeros. No decay.

    Args:
        dim: D, the size of the last dimension.
        value: Where α starts.

    Source:
        Zhu et al., *Transformers without Normalization*, arXiv:2503.10622.

    Example:
        >>> import learnables as ln
        >>> ln.nn.DyT(2)(torch.tensor([0.0, 100.0]))
        tensor([0., 1.], grad_fn=<AddBackward0>)
    """

    def __init__(self, dim: int, value: float = 0.5) -> None:
        super().__init__()
        self.alpha = parameter(
            1,
            init=constant(value),
            weight_decay=False,
            tags=("scale", "fp32"),
        )
        self.gamma = parameter(dim, init=ones(), weight_decay=False, tags=("scale",))
        self.beta = parameter(dim, init=zeros(), weight_decay=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D), in the dtype of ``x``; tanh in fp32."""
        squashed = (wide(self.alpha) * wide(x)).tanh().to(x.dtype)
        return self.gamma.to(x.dtype) * squashed + self.beta.to(x.dtype)


@final
class Snake(Component):
    """x + sin²(α x) / β for each channel: a nonlinearity that can follow a period.

    α and β are kept as logarithms, so that both stay positive.

    Parameters:
        log_alpha (1, C, 1): zeros. No decay.
        log_beta (1, C, 1): likewise.

    Args:
        channels: C.
        init: Another initialiser, for both.

    Source:
        Ziyin et al., *Neural Networks Fail to Learn Periodic Functions and How to Fix It*,
        arXiv:2006.08195.

    Example:
        >>> import learnables as ln
        >>> ln.nn.Snake(3)(torch.zeros(2, 3, 16)).shape
        torch.Size([2, 3, 16])
    """

    def __init__(self, channels: int, *, init: Init | None = None) -> None:
        super().__init__()
        init = init or zeros()
        self.log_alpha = parameter(1, channels, 1, init=init, weight_decay=False, tags=("fp32",))
        self.log_beta = parameter(1, channels, 1, init=init, weight_decay=False, tags=("fp32",))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) → (B, C, T), in the dtype of ``x``; computed in fp32."""
        alpha, beta = wide(self.log_alpha).exp(), wide(self.log_beta).exp()
        return (wide(x) + (alpha * wide(x)).sin().square() / (beta + 1e-9)).to(x.dtype)
