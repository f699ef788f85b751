"""Which family of models a model is of."""

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from learnables.errors import SelectionError
from learnables.grafting import families
from learnables.grafting.anatomy import Anatomy


def anatomy_of(model: nn.Module) -> Anatomy:
    """What the first family that knows ``model`` says; families are asked in order of their names.

    Raises:
        SelectionError: No family knows it; the message offers the lists of blocks it has.
    """
    for info in sorted(iter_modules(families.__path__), key=lambda info: info.name):
        found: Anatomy | None = import_module(f"{families.__name__}.{info.name}").look(model)
        if found is not None:
            return found
    stacks = list(_stacks(model))
    raise SelectionError(
        "no family of models knows where tokens go in this one",
        found=f"{type(model).__module__}.{type(model).__qualname__}",
        wanted="the path of its list of blocks, or of one module",
        mend=f"at={stacks[0] + '.*'!r}" if stacks else "ln.graft(model, name, component, at=PATH)",
    )


def _stacks(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if name and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            kinds = {type(child) for child in module}
            if len(kinds) == 1 and kinds.isdisjoint({nn.Linear, nn.Identity}):
                yield name
