"""A parameter that the forward sees through components, and everybody else as it is.

While a forward of its owner, or of any module around it, runs, and while autograd runs backward
(activation checkpointing computes forwards again there), reading the attribute gives what the
components make of the Parameter. It is computed where it is read: a parent that reads
``self.child.weight`` sees the same as the child, and what is recomputed in a checkpoint is what was
computed there. At all other times the attribute is the Parameter, for optimizers, ties and people.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from learnables._torch import in_backward
from learnables.errors import LearnablesError
from learnables.grafting.hooks import misfit
from learnables.sharing.descriptors import dress

_CHANGES = "_learnables_changes"
# Where owners keep what they made of a parameter, in evaluation mode: timm's LeViT, TinyViT,
# EfficientFormer and EfficientViT.
_CACHES = ("attention_bias_cache",)


@dataclass(eq=False)
class _Changes:
    """What changes one parameter of one module: the components, and how many forwards are on."""

    components: list[nn.Module] = field(default_factory=list)
    forwards: int = 0


@dataclass
class _Begin:
    """Before a module around the parameter."""

    changes: _Changes

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.changes.forwards += 1


@dataclass
class _End:
    """After it, also where it raised or where recomputation stopped early."""

    changes: _Changes

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        self.changes.forwards = max(0, self.changes.forwards - 1)


@dataclass
class _Forget:
    """Before and after the owner: what it kept of the parameter is of other values of the delta.

    While the delta trains under a frozen, evaluated model it is another one at each forward, and
    after the graft is removed the base has to be what it was.
    """

    caches: tuple[str, ...]

    def __call__(self, module: nn.Module, args: Any, out: Any = None) -> None:
        for name in self.caches:
            setattr(module, name, {})


class _Changed:
    """The descriptor that stands for the parameter.

    Parameters that are assigned go the way they always went. A plain tensor in a Parameter's place,
    as ``DataParallel`` puts it there, is changed as the Parameter was.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, _: type | None = None) -> Any:
        if module is None:
            return self
        if self.name in module._parameters:
            value = module._parameters[self.name]
        elif self.name in module.__dict__:
            value = module.__dict__[self.name]
        else:
            raise AttributeError(self.name)
        # None after the last graft was removed under a class that FSDP2 had put on top.
        changes: _Changes | None = module.__dict__.get(_CHANGES, {}).get(self.name)
        if value is None or changes is None or not (changes.forwards or in_backward()):
            return value
        return _through(changes.components, value, self.name)

    def __set__(self, module: nn.Module, value: object) -> None:
        module.__dict__[self.name] = value

    def __delete__(self, module: nn.Module) -> None:
        if self.name not in module.__dict__:
            raise AttributeError(self.name)
        del module.__dict__[self.name]


def _through(components: list[nn.Module], value: Tensor, name: str) -> Tensor:
    try:
        for component in components:
            value = component(value)
    except AttributeError as error:
        # Out of a descriptor it would make torch fall back to the Parameter, without a word.
        raise LearnablesError(
            "a component on a parameter failed", where=name, found=f"AttributeError: {error}"
        ) from error
    except RuntimeError as error:
        known = misfit(error, component, name, value)
        if known is None:
            raise
        raise known from error
    return value


def change(
    model: nn.Module, path: str, local_name: str, component: nn.Module
) -> list[RemovableHandle]:
    """Let forwards of ``model`` see ``local_name`` of the module at ``path`` through a component.

    Returns:
        Handles of the hooks; `unchange` takes away the rest.
    """
    owner = model.get_submodule(path)
    changes = owner.__dict__.setdefault(_CHANGES, {}).setdefault(local_name, _Changes())
    changes.components.append(component)
    dress(owner, _Changed, _CHANGES)
    parts = path.split(".") if path else []
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    begin, end = _Begin(changes), _End(changes)
    handles: list[RemovableHandle] = []
    for module in around:  # first of all hooks: one that raises before it would count too little
        handles.append(module.register_forward_pre_hook(begin, prepend=True))
        handles.append(module.register_forward_hook(end, always_call=True))
    if caches := tuple(name for name in _CACHES if isinstance(getattr(owner, name, None), dict)):
        forget = _Forget(caches)
        handles.append(owner.register_forward_pre_hook(forget))
        handles.append(owner.register_forward_hook(forget, always_call=True))
    return handles


def unchange(owner: nn.Module, local_name: str, component: nn.Module) -> None:
    """Take ``component`` out of what changes the parameter."""
    changes: _Changes = owner.__dict__[_CHANGES][local_name]
    changes.components.remove(component)
    if changes.components:
        return
    del owner.__dict__[_CHANGES][local_name]
    dress(owner, _Changed, _CHANGES)
    if not owner.__dict__[_CHANGES]:
        del owner.__dict__[_CHANGES]
