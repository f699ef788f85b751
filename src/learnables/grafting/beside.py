"""What was grafted into a container of modules is not one of the modules that the container runs.

``nn.Sequential`` calls whatever is registered in it, one after the other, so a component in one
would act twice: where it was grafted, and once more behind the last layer.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from learnables.sharing.descriptors import dress

_BESIDE = "_learnables_beside"


def lay_beside(model: nn.Module, names: Iterable[str]) -> None:
    """Let ``model`` iterate over its modules without ``names``, where it is a container of a list.

    It is registered as before: state dict, parameters and ``named_modules()`` have it.
    """
    if not isinstance(model, _CONTAINERS):
        return
    names = frozenset(names)
    model.__dict__[_BESIDE] = dict.fromkeys(_METHODS, names) if names else {}
    dress(model, _method, _BESIDE)
    if not names:
        del model.__dict__[_BESIDE]


def _own(container: nn.Module) -> dict[str, nn.Module]:
    beside = container.__dict__.get(_BESIDE, {}).get("__iter__", ())
    return {n: m for n, m in container._modules.items() if n not in beside}  # type: ignore[misc]


def _iter(container: nn.Module) -> Iterator[nn.Module]:
    return iter(list(_own(container).values()))


def _len(container: nn.Module) -> int:
    return len(_own(container))


def _item(container: nn.Module, index: int | slice) -> nn.Module:
    if not isinstance(index, slice):
        return list(_own(container).values())[index]
    some = OrderedDict(list(_own(container).items())[index])
    # As torch's own do: a Sequential is built of names and modules, a list of modules.
    return type(container)(some if isinstance(container, nn.Sequential) else some.values())


_CONTAINERS = (nn.Sequential, nn.ModuleList)
_METHODS: dict[str, Callable[..., Any]] = {"__iter__": _iter, "__len__": _len, "__getitem__": _item}


def _method(name: str) -> Callable[..., Any]:
    """A plain function, which dynamo traces."""
    return _METHODS[name]
