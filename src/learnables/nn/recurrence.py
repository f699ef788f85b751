"""Learned vectors of state-space models.

Shapes: H heads.
"""

from typing import NamedTuple, final

import torch.nn.functional as F
from torch import Tensor

from learnables.declare import parameter
from learnables.init.fixed import log, ones, softplus_inverse
from learnables.init.random import log_uniform, uniform
from learnables.nn.component import Component, wide


class Discretised(NamedTuple):
    """What a state-space layer reads: decay, skip and time step, all in fp32.

    Attributes:
        A: (H), negative.
        D: (H).
        dt: (…, H), positive.
    """

    A: Tensor
    D: Tensor
    dt: Tensor


@final
class StateSpaceVectors(Component):
    """A, D and the bias of dt, in the forms that keep A negative and dt positive.

    All three are to be kept in fp32 and never decayed: the rule of many trainers decays them, which
    pulls every decay rate to 1 and every time step to softplus(0).

    Parameters:
        A_log (H): logarithm of uniform(1, 16). No decay. A = −exp(A_log).
        D (H): ones. No decay.
        dt_bias (H): inverse softplus of log-uniform(``dt_min``, ``dt_max``). No decay.

    Args:
        num_heads: H.
        dt_min: Shortest time step at first.
        dt_max: Longest time step at first.

    Source:
        Dao & Gu, *Transformers are SSMs* (Mamba-2), arXiv:2405.21060.

    Example:
        >>> import learnables as ln
        >>> A, D, dt = ln.nn.StateSpaceVectors(4)(torch.zeros(2, 16, 4))
        >>> bool((A < 0).all()), bool((dt > 0.9e-3).all() and (dt < 0.11).all())
        (True, True)
    """

    def __init__(self, num_heads: int, dt_min: float = 1e-3, dt_max: float = 0.1) -> None:
        super().__init__()
        self.A_log = parameter(
            num_heads, init=log(uniform(1, 16)), weight_decay=False, tags=("fp32",)
        )
        self.D = parameter(num_heads, init=ones(), weight_decay=False, tags=("fp32",))
        self.dt_bias = parameter(
            num_heads,
            init=softplus_inverse(log_uniform(dt_min, dt_max)),
            weight_decay=False,
            tags=("fp32",),
        )

    def forward(self, dt: Tensor) -> Discretised:
        """Time steps before their bias, (…, H) → (A, D, dt)."""
        steps = F.softplus(wide(dt) + wide(self.dt_bias))
        return Discretised(-wide(self.A_log).exp(), wide(self.D), steps)
