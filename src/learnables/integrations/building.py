"""The optimizer that every integration builds: our groups, and what groups cannot carry."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from learnables.policy.attach import attach
from learnables.policy.groups import param_groups
from learnables.policy.resolve import Policy


def build_optimizer(
    model: nn.Module,
    optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    weight_decay: float = 0.0,
    policy: Policy | None = None,
    layer_decay: float | None = None,
    **options: Any,
) -> Optimizer:
    """An optimizer over `ln.param_groups` of ``model``, with `ln.attach` done.

    Args:
        model: The model, bare, wrapped or sharded, as it is stepped.
        optimizer: A class or function that takes a list of groups.
        lr: Base learning rate.
        weight_decay: Coefficient for what decays.
        policy: As in `ln.param_groups`.
        layer_decay: Likewise.
        options: Handed to ``optimizer``.

    Returns:
        The optimizer.

    Example:
        >>> from learnables.integrations.building import build_optimizer
        >>> optimizer = build_optimizer(nn.Linear(2, 1), lr=1e-3, weight_decay=0.1)
        >>> [(group["name"], group["weight_decay"]) for group in optimizer.param_groups]
        [('decay', 0.1), ('no decay', 0.0)]
    """
    groups = param_groups(
        model, lr=lr, weight_decay=weight_decay, policy=policy, layer_decay=layer_decay
    )
    built = optimizer(groups, lr=lr, **options)
    attach(model, built)
    return built
