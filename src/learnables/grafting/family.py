"""Which family of models a model is of."""

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from learnables.errors import SelectionError
from learnables.grafting import families
from learnables.grafting.anatomy import Anatomy


def anatomy_of(model: nn.Module) -> Anatomy:
    """What the first family that knows ``model``, or a module in it, says.

    Families are asked in order of their names, about the outermost module first.

    Raises:
        SelectionError: No family knows it, and the message offers the lists of blocks it has; or
            it holds several models that are known.
    """
    found = list(known_in(model))
    if len(found) > 1:
        raise SelectionError(
            "several models in this one are known",
            found=", ".join(f"{a.blocks!r}" for a in found),
            wanted="the blocks of one of them",
            mend=f"at={found[0].blocks + '.*'!r}",
        )
    if found:
        return found[0]
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if count := _convolutions(model):
        raise SelectionError(
            "a convolutional network has no sequence of tokens",
            found=f"{kind}, {count} convolutions and no attention",
            wanted="blocks that map (B, N, D) to (B, N, D), or where the component acts",
            mend="at='', where='input' for the image; at=PATH, where='output' for a feature map",
        )
    stacks = list(_stacks(model))
    raise SelectionError(
        "no family of models knows where tokens go in this one",
        found=kind,
        wanted="the path of its list of blocks, or of one module",
        mend=f"at={stacks[0] + '.*'!r}" if stacks else "ln.graft(model, name, component, at=PATH)",
    )


def known_in(model: nn.Module) -> Iterator[Anatomy]:
    """What families say about ``model``, or, where none knows it, about the modules in it."""
    looks = [
        import_module(f"{families.__name__}.{info.name}").look
        for info in sorted(iter_modules(families.__path__), key=lambda info: info.name)
    ]

    asked: set[int] = set()

    def ask(module: nn.Module, path: str) -> Iterator[Anatomy]:
        if id(module) in asked:
            return
        asked.add(id(module))
        for look in looks:
            found: Anatomy | None = look(module)
            if found is not None:
                yield found.inside(path)
                return
        for name, child in module.named_children():
            yield from ask(child, f"{path}.{name}" if path else name)

    return ask(model, "")


def _convolutions(model: nn.Module) -> int:
    """How many a convolutional network has; 0 where attention is in the model."""
    modules = list(model.modules())
    kinds = {type(module).__name__.lower() for module in modules}
    if any("attention" in kind or "attn" in kind for kind in kinds):
        return 0
    return sum(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in modules)


def _stacks(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if name and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            kinds = {type(child) for child in module}
            if len(kinds) == 1 and kinds.isdisjoint({nn.Linear, nn.Identity}):
                yield name
