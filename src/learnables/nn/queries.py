"""Learned queries that read a sequence: latents, object queries, slots.

Shapes: B batch, N tokens, Q queries, S slots, E experts, D dim.
"""

import math
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from learnables.declare import parameter
from learnables.errors import ShapeError
from learnables.init.base import Init
from learnables.init.fixed import ones
from learnables.init.random import normal, trunc_normal, uniform
from learnables.nn.component import Component, wide
from learnables.nn.resample import ResizeRows


@final
class Queries(Component):
    """Learned vectors that ask, the same for every sample.

    The latents of a Perceiver, the object queries of DETR, the query tokens of a Q-Former, the
    probe of an attention pool.

    A checkpoint with another number of queries loads: surplus ones are left out, missing ones keep
    a fresh draw (equal ones would get equal gradients for ever).

    Parameters:
        tokens (1, Q, D): ``trunc_normal(0.02)``, as in BLIP-2; DETR and Perceiver ports draw with
            std 1, SigLIP's pool with D^-½. No decay.

    Args:
        num_queries: Q.
        dim: D.
        init: Another initialiser.

    Source:
        Jaegle et al., *Perceiver*, arXiv:2103.03206; Carion et al., *End-to-End Object Detection
        with Transformers*, arXiv:2005.12872; Li et al., *BLIP-2*, arXiv:2301.12597.

    Example:
        >>> import learnables as ln
        >>> ln.nn.Queries(5, 8)(torch.zeros(2, 16, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, num_queries: int, dim: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.num_queries = num_queries
        init = init or trunc_normal(0.02)
        self.tokens = parameter(
            1,
            num_queries,
            dim,
            init=init,
            weight_decay=False,
            resize=ResizeRows(1, init),
            tags=("query",),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The queries (B, Q, D) for a batch of (B, …), in the dtype of ``x``; a view."""
        return self.tokens.to(x.dtype).expand(x.shape[0], -1, -1)


@final
class Slots(Component):
    """Slots drawn anew for every sample from one learned normal distribution.

    Any number of slots can be drawn, also another one than in training.

    Parameters:
        mean (1, 1, D): uniform in ±√(6 / (1 + D)). No decay.
        log_sigma (1, 1, D): likewise; used as exp(log_sigma), in fp32.

    Args:
        num_slots: S.
        dim: D.
        init: Another initialiser, for both.

    Source:
        Locatello et al., *Object-Centric Learning with Slot Attention*, arXiv:2006.15055.

    Example:
        >>> import learnables as ln
        >>> ln.nn.Slots(5, 8)(torch.zeros(2, 16, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, num_slots: int, dim: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.num_slots = num_slots
        bound = math.sqrt(6 / (1 + dim))
        init = init or uniform(-bound, bound)
        self.mean = parameter(1, 1, dim, init=init, weight_decay=False, tags=("query",))
        self.log_sigma = parameter(
            1,
            1,
            dim,
            init=init,
            weight_decay=False,
            tags=("query", "fp32"),
        )

    def forward(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Fresh slots (B, S, D) for a batch of (B, …), in the dtype of ``x``."""
        mean, sigma = wide(self.mean), wide(self.log_sigma).exp()
        shape = (x.shape[0], self.num_slots, mean.shape[-1])
        noise = torch.randn(shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return (mean + sigma * noise).to(x.dtype)


@final
class SlotEmbeddings(Component):
    """How well each token fits each slot of each expert: the logits of a soft mixture of experts.

    Tokens and slots are brought to length 1, so the logits are cosines times one learned scale.

    Parameters:
        slots (E, S, D): normal with std 1; only the direction matters. No decay.
        scale (1): 1. No decay.

    Args:
        num_experts: E.
        num_slots: S, for each expert.
        dim: D.
        init: Another initialiser of the slots.

    Source:
        Puigcerver et al., *From Sparse to Soft Mixtures of Experts*, arXiv:2308.00951.

    Example:
        >>> import learnables as ln
        >>> ln.nn.SlotEmbeddings(4, 2, 8)(torch.randn(3, 16, 8)).shape
        torch.Size([3, 16, 4, 2])
    """

    def __init__(
        self, num_experts: int, num_slots: int, dim: int, *, init: Init | None = None
    ) -> None:
        super().__init__()
        self.slots = parameter(
            num_experts,
            num_slots,
            dim,
            init=init or normal(1.0),
            weight_decay=False,
            tags=("query",),
        )
        self.scale = parameter(1, init=ones(), weight_decay=False, tags=("scale", "fp32"))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, N, E, S), in the dtype of ``x``.

        Raises:
            ShapeError: ``x`` has another width.
        """
        if x.shape[-1] != self.slots.shape[-1]:
            raise ShapeError(
                "tokens and slots have one width",
                found=f"input of shape {tuple(x.shape)}",
                wanted=f"(B, N, {self.slots.shape[-1]})",
            )
        slots = F.normalize(wide(self.slots), dim=-1) * wide(self.scale)
        return torch.einsum("bnd,esd->bnes", F.normalize(wide(x), dim=-1), slots).to(x.dtype)
