"""Wait for training to begin, in a program that hands nothing over.

Until the first optimizer is built only its constructor is watched. From then on compiled code runs
as plain Python, so that nothing is compiled while hooks are there. Training begins with the first
forward, with gradients, of a module that holds a parameter of an optimizer, with the first
``zero_grad``, or inside the first step that is given a closure (LBFGS, Lightning). Everything is
taken away again at that moment.
"""

import functools
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from learnables._torch import on_module_forward, on_optimizer_step, without_compiling
from learnables.auditing.discover import optimizers_alive
from learnables.auditing.patches import Patches


@final
class Lookout:
    """Calls ``found`` once, when training begins.

    Args:
        found: What to do then; by that time nothing of the lookout is left.
        adopt: Called after it where training begins inside an optimizer's step, with the optimizer
            and its closure; what comes back is called in place of the closure.
    """

    def __init__(
        self,
        found: Callable[[], None],
        adopt: Callable[[Optimizer, Callable[[], Any]], Callable[[], Any]],
    ) -> None:
        self.steps = 0
        """Optimizer steps that were seen while waiting: of a loop of another kind."""
        self._found, self._adopt = found, adopt
        self._patches = Patches()
        self._compiling = ExitStack()
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._is_armed = False

    def open(self) -> None:
        """Begin to wait."""
        self._patches.wrap(Optimizer, "__init__", self._wrap_new_optimizer)
        self._patches.wrap(torch, "compile", self._wrap_compile)
        for optimizer in optimizers_alive():
            self._arm(optimizer)

    def close(self) -> None:
        """Stop waiting and put everything back."""
        self._patches.undo()
        self._compiling.close()

    def _wrap_new_optimizer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def __init__(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            original(optimizer, *args, **kwargs)
            self._arm(optimizer)

        return __init__

    def _wrap_compile(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def compile(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._is_armed:
                self._stop_compiling()
            return result

        return compile

    def _stop_compiling(self) -> None:
        """In force as soon as the compiler is loaded, which the first `torch.compile` does."""
        self._compiling.close()
        self._compiling.enter_context(without_compiling())

    def _arm(self, optimizer: Optimizer) -> None:
        self._optimizers.add(optimizer)
        if self._is_armed:
            return
        self._is_armed = True
        self._stop_compiling()
        self._patches.on_exit(on_module_forward(self._forward))
        self._patches.on_exit(on_optimizer_step(self._before_step, self._after_step))
        self._patches.wrap(Optimizer, "zero_grad", self._wrap_zero_grad)
        self._patches.wrap(nn.Module, "zero_grad", self._wrap_zero_grad)

    def _wrap_zero_grad(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def zero_grad(subject: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(subject, Optimizer) or self._is_trained(subject):
                self._begin()
            now = Optimizer if isinstance(subject, Optimizer) else nn.Module
            return now.zero_grad(subject, *args, **kwargs)  # as it is wrapped from here on

        return zero_grad

    def _forward(self, module: nn.Module, _: Any) -> None:
        if torch.is_grad_enabled() and self._is_trained(module):
            self._begin()

    def _is_trained(self, module: nn.Module) -> bool:
        held: set[int] | None = None
        for p in module.parameters():
            if not p.requires_grad:
                continue
            if held is None:
                groups = [group for o in self._optimizers for group in o.param_groups]
                held = {id(x) for group in groups for x in group["params"]}
            if id(p) in held:
                return True
        return False

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure") or next(iter(args[1:]), None)
        if not callable(closure):
            return None
        adopted: list[Callable[[], Any]] = []

        def first() -> Any:
            if not adopted:
                self._begin()
                adopted.append(self._adopt(optimizer, closure))
            return adopted[0]()

        if "closure" in kwargs:
            return args, {**kwargs, "closure": first}
        return tuple(first if a is closure else a for a in args), kwargs

    def _after_step(self, *_: Any) -> None:
        self.steps += 1

    def _begin(self) -> None:
        self.close()
        self._found()
