"""What is put right after ``.to()``, ``.half()`` and ``to_empty``, which all go through ``_apply``.

Torch has no hook there, and a subclass would change the type of the user's module. So an instance
attribute stands for the method of this one module; parents call it like the method.
"""

from collections.abc import Callable
from typing import Any, final

from torch import Tensor, nn


@final
class _Converting:
    """Stands for ``module._apply``; copies and pickles go with the module that they belong to."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.afterwards: list[Callable[[nn.Module], None]] = []
        self.instead: list[Callable[[nn.Module, Tensor, Tensor], Tensor]] = []

    def __call__(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        convert: Any = type(self.module)._apply

        def converted(x: Tensor) -> Tensor:
            y = fn(x)
            for keep in self.instead:
                y = keep(self.module, x, y)
            return y

        convert(self.module, converted if self.instead else fn, *args, **kwargs)
        for put_right in self.afterwards:
            put_right(self.module)
        return self.module


def after_conversion(module: nn.Module, put_right: Callable[[nn.Module], None]) -> None:
    """Call ``put_right(module)`` whenever the module's tensors were converted; once, if twice said.

    Args:
        module: The module, or any below it whose parents are converted.
        put_right: A function of a module of ours, so that it can be pickled.
    """
    kept = _converting(module)
    if put_right not in kept.afterwards:
        kept.afterwards.append(put_right)


def during_conversion(
    module: nn.Module, keep: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> None:
    """Let ``keep(module, before, after)`` say what each tensor becomes; once, if twice said.

    Args:
        module: The module, or any below it whose parents are converted.
        keep: A function of a module of ours; gets tensors of the modules below it too.
    """
    kept = _converting(module)
    if keep not in kept.instead:
        kept.instead.append(keep)


def _converting(module: nn.Module) -> _Converting:
    kept = module.__dict__.get("_apply")
    if not isinstance(kept, _Converting):
        kept = module.__dict__["_apply"] = _Converting(module)
    return kept
