"""Find the models and optimizers that are alive, for loops that hand nothing over."""

import gc
from collections.abc import Iterable
from typing import final

from torch import nn
from torch.optim import Optimizer


def optimizers_alive() -> list[Optimizer]:
    """Every optimizer in memory that holds parameters, oldest first."""
    return [o for o in gc.get_objects() if issubclass(type(o), Optimizer) and o.param_groups]


def roots_alive() -> list[nn.Module]:
    """Every module in memory that no other module holds."""
    modules = [
        m for m in gc.get_objects() if issubclass(type(m), nn.Module) and "_modules" in vars(m)
    ]
    children = {id(c) for m in modules for c in m._modules.values() if c is not None}
    return [m for m in modules if id(m) not in children and type(m) is not Everything]


@final
class Everything(nn.Module):
    """Stands for all models of a program at once; holds them by the names it gives them."""

    @classmethod
    def alive(cls, optimizers: Iterable[Optimizer]) -> nn.Module:
        """The one model whose parameters an optimizer holds, or all such models together."""
        held = {
            id(p)
            for optimizer in [*optimizers, *optimizers_alive()]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        roots = [m for m in roots_alive() if held.intersection(map(id, m.parameters()))]
        if len(roots) == 1:
            return roots[0]
        everything = cls()
        for i, root in enumerate(roots):
            everything.add_module(f"{type(root).__name__}_{i}", root)
        return everything
