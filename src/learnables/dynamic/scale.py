"""How large what a condition generates comes out, so that the generated weight starts right."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from learnables.errors import LearnablesError

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "linear": lambda logits: logits,
}
"""What turns K logits into K coefficients."""


def second_moment(activation: Callable[[Tensor], Tensor]) -> float:
    """E[activation(z)²] for a standard normal z: 1/2 for ReLU, 0.4252 for GELU.

    Raises:
        LearnablesError: It is 0 or not finite, so that nothing can be scaled by it.

    Example:
        >>> round(second_moment(torch.relu), 3)
        0.5
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(201)
    with torch.no_grad(), torch.device("cpu"):
        value = activation(torch.from_numpy(nodes)).square()
    moment = float((value * torch.from_numpy(weights)).sum() / math.sqrt(2 * math.pi))
    if not 0 < moment < math.inf:
        raise LearnablesError(
            "an activation without output cannot carry a condition",
            found=f"mean square {moment} for standard normal input",
            wanted="a finite positive number",
        )
    return moment


def sum_of_squares(gate: str, num: int) -> float:
    """E[Σ_k a_k²] for the coefficients that ``gate`` makes of ``num`` standard normal logits.

    Example:
        >>> sum_of_squares("linear", 8)
        8.0
    """
    if gate == "linear":
        return float(num)
    if gate == "sigmoid":
        return num * second_moment(torch.sigmoid)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1 << 14, num, generator=generator, device="cpu")
    return float(GATES[gate](logits).square().sum(-1).mean())
