"""At home in Accelerate: our groups through ``prepare``, and a watch that knows its scaler.

```python
accelerator = Accelerator()
model, optimizer, loader = prepare(accelerator, model, loader, lr=1e-3, weight_decay=0.05)
with watch(accelerator, model, optimizer, every=100):
    ...
```
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from learnables.policy.attach import attach
from learnables.policy.groups import param_groups
from learnables.policy.resolve import Policy
from learnables.runtime.declared import Declared
from learnables.watching.gradient import steppable
from learnables.watching.recorder import Watcher
from learnables.watching.recorder import watch as _watch
from learnables.watching.sinks.base import Sink


def prepare(
    accelerator: Any,
    model: nn.Module,
    *others: Any,
    optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
    lr: float,
    weight_decay: float = 0.0,
    policy: Policy | None = None,
    layer_decay: float | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """``accelerator.prepare`` for a model, an optimizer over our groups, and whatever else.

    The groups are built from the bare model; what groups cannot carry (`ln.attach`) is hooked to
    the prepared optimizer's inner one, because the wrapper runs no hooks of its own.

    Args:
        accelerator: The ``accelerate.Accelerator``.
        model: The bare model.
        others: Loaders and the like, prepared together.
        optimizer: A class or function that takes a list of groups.
        lr: Base learning rate.
        weight_decay: Coefficient for what decays.
        policy: As in `ln.param_groups`.
        layer_decay: Likewise.
        options: Handed to ``optimizer``.

    Returns:
        The prepared model, optimizer and others, in this order.
    """
    groups = param_groups(
        model, lr=lr, weight_decay=weight_decay, policy=policy, layer_decay=layer_decay
    )
    built = optimizer(groups, lr=lr, **options)
    prepared: tuple[Any, ...] = tuple(accelerator.prepare(model, built, *others))
    attach(prepared[0], steppable(prepared[1]))
    return prepared


def watch(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    every: int = 100,
    to: "str | Path | None" = "runs/run",
    sinks: Sequence[Sink] = (),
    **options: Any,
) -> Watcher:
    """`ln.watch` for what ``accelerator.prepare`` returned.

    While Accelerate accumulates, ``optimizer.step()`` does nothing, and nothing is recorded; the
    steps that its scaler skips are marked.

    Args:
        accelerator: The ``accelerate.Accelerator``.
        model: The prepared model.
        optimizer: The prepared optimizer, or all of them.
        every: As in `ln.watch`, like all that follow.
        to: Folder of the run database.
        sinks: Where else the numbers go.
        options: More keywords of `ln.watch`.

    Returns:
        The watcher.
    """
    scaler = getattr(accelerator, "scaler", None)
    return _watch(model, optimizer, every, to, sinks, scaler=scaler, **options)


def keep_declared(accelerator: Any, model: nn.Module, optimizer: Any) -> Declared:
    """Let ``accelerator.save_state`` and ``load_state`` keep what was declared, too.

    They keep values and optimizer state by themselves, but not the values that parameters decay
    toward. Call it before either, and in the same place among other calls of
    ``register_for_checkpointing``, whose order Accelerate goes by.

    Args:
        accelerator: The ``accelerate.Accelerator``.
        model: The prepared model.
        optimizer: The prepared optimizer, or all of them.

    Returns:
        What was registered; its ``changed`` says, after loading, what is declared otherwise now.
    """
    several = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    declared = Declared(model, [steppable(one) for one in several])
    accelerator.register_for_checkpointing(declared)
    return declared
