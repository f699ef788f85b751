"""Learned factors on a branch, a channel or a head.

Shapes: B batch, N tokens, H heads, D dim, d head dim, C channels.
"""

from typing import Literal, final

import torch.nn.functional as F
from torch import Tensor

from learnables.declare import parameter
from learnables.errors import PolicyError
from learnables.init.base import Init
from learnables.init.fixed import constant, ones, zeros
from learnables.nn.component import Component, wide


@final
class LayerScale(Component):
    """One learned factor per channel on a residual branch, small at first.

    Parameters:
        gamma (D): constant ``value``. No decay. Keep it in fp32: in bf16, a step smaller than
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
            tags=("scale", "fp32"),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D), in the dtype of ``x``."""
        return x * self.gamma.to(x.dtype)


@final
class LayerScale2d(Component):
    """`LayerScale` for images: one factor per channel of (B, C, H, W).

    Parameters:
        gamma (C, 1, 1): constant ``value``. No decay; rules that go by the number of dimensions
            decay it.

    Args:
        channels: C.
        value: Where it starts.
        init: Another initialiser.

    Source:
        Touvron et al., *Going deeper with Image Transformers*, arXiv:2103.17239.

    Example:
        >>> import learnables as ln
        >>> ln.nn.LayerScale2d(3, value=0.5)(torch.ones(1, 3, 1, 1)).flatten()
        tensor([0.5000, 0.5000, 0.5000], grad_fn=<ViewBackward0>)
    """

    def __init__(self, channels: int, value: float = 1e-5, *, init: Init | None = None) -> None:
        super().__init__()
        self.gamma = parameter(
            channels,
            1,
            1,
            init=init or constant(value),
            weight_decay=False,
            tags=("scale", "fp32"),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W), in the dtype of ``x``."""
        return x * self.gamma.to(x.dtype)


@final
class ReZero(Component):
    """One learned factor on a residual branch, 0 at first, so that the block starts as identity.

    Parameters:
        alpha (1): zeros. No decay, which would only ever close the branch. Shape (1) rather than
            (): FSDP refuses the latter, and several published rules decay it.

    Args:
        init: Another initialiser.

    Source:
        Bachlechner et al., *ReZero is All You Need*, arXiv:2003.04887; De & Smith, *Batch
        Normalization Biases Residual Blocks Towards the Identity Function* (its SkipInit),
        arXiv:2002.10444.

    Example:
        >>> import learnables as ln
        >>> x, branch = torch.ones(3), torch.randn(3)
        >>> torch.equal(x + ln.nn.ReZero()(branch), x)
        True
    """

    def __init__(self, *, init: Init | None = None) -> None:
        super().__init__()
        self.alpha = parameter(
            1,
            init=init or zeros(),
            weight_decay=False,
            tags=("scale", "fp32"),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → the same, in the dtype of ``x``."""
        return x * self.alpha.to(x.dtype)


@final
class Gate(Component):
    """A branch times tanh(α) or sigmoid(α): bounded, so that no step can blow it up.

    Parameters:
        alpha (dim): constant ``value``. No decay, which would close a tanh gate and half open a
            sigmoid one.

    Args:
        dim: 1 for the whole branch, or the size of its last dimension.
        kind: ``"tanh"`` in (−1, 1), closed at 0; ``"sigmoid"`` in (0, 1), half open at 0.
        value: Where α starts.
        init: Another initialiser.

    Raises:
        PolicyError: No such kind.

    Source:
        Alayrac et al., *Flamingo*, arXiv:2204.14198 (tanh); d'Ascoli et al., *ConViT*,
        arXiv:2103.10697 (sigmoid, from 1).

    Example:
        >>> import learnables as ln
        >>> ln.nn.Gate()(torch.ones(2))
        tensor([0., 0.], grad_fn=<MulBackward0>)
        >>> ln.nn.Gate(kind="sigmoid").opening()
        tensor([0.5000], grad_fn=<SigmoidBackward0>)
    """

    def __init__(
        self,
        dim: int = 1,
        kind: Literal["tanh", "sigmoid"] = "tanh",
        value: float = 0.0,
        *,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("tanh", "sigmoid"):
            raise PolicyError("no such gate", found=f"kind={kind!r}", wanted="'tanh' or 'sigmoid'")
        self.kind = kind
        self.alpha = parameter(
            dim,
            init=init or constant(value),
            weight_decay=False,
            tags=("scale", "fp32"),
        )

    def opening(self) -> Tensor:
        """tanh(α) or sigmoid(α), shape (dim), computed in fp32."""
        alpha = wide(self.alpha)
        return alpha.tanh() if self.kind == "tanh" else alpha.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, dim), in the dtype of ``x``."""
        return x * self.opening().to(x.dtype)


@final
class HeadScale(Component):
    """One learned factor for the output of each head.

    Parameters:
        gamma (1, H, 1, 1): ones. No decay.

    Args:
        num_heads: H.
        init: Another initialiser.

    Source:
        Shleifer et al., *NormFormer*, arXiv:2110.09456.

    Example:
        >>> import learnables as ln
        >>> ln.nn.HeadScale(4)(torch.ones(2, 4, 3, 8)).shape
        torch.Size([2, 4, 3, 8])
    """

    def __init__(self, num_heads: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.gamma = parameter(
            1,
            num_heads,
            1,
            1,
            init=init or ones(),
            weight_decay=False,
            tags=("scale", "fp32"),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, d) → (B, H, N, d), in the dtype of ``x``."""
        return x * self.gamma.to(x.dtype)


@final
class QKScale(Component):
    """Queries or keys brought to length 1, then times one learned factor per head and feature.

    One for the queries, one for the keys. Lengths are computed in fp32.

    Parameters:
        gamma (H, 1, d): constant ``value``. No decay.

    Args:
        num_heads: H.
        head_dim: d.
        value: Where the factor starts. The product of both sides is the largest logit at first; the
            1/√d of scaled-dot-product attention comes on top unless ``scale=1`` is passed to it.
        init: Another initialiser.

    Source:
        Henry et al., *Query-Key Normalization for Transformers*, arXiv:2010.04245.

    Example:
        >>> import learnables as ln
        >>> q = ln.nn.QKScale(4, 8)(torch.randn(2, 4, 3, 8))
        >>> torch.allclose(q.norm(dim=-1), torch.ones(2, 4, 3))
        True
    """

    def __init__(
        self, num_heads: int, head_dim: int, value: float = 1.0, *, init: Init | None = None
    ) -> None:
        super().__init__()
        self.gamma = parameter(
            num_heads,
            1,
            head_dim,
            init=init or constant(value),
            weight_decay=False,
            tags=("scale", "fp32"),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, d) → (B, H, N, d), in the dtype of ``x``."""
        return (F.normalize(wide(x), dim=-1) * wide(self.gamma)).to(x.dtype)
