"""Descriptors in the class of one module, as torch's parametrizations have them.

The module gets a subclass of its class under the same name. It is copied and pickled as the plain
class; the descriptors come back with the state.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

Kind: TypeAlias = Callable[[str], Any]  # the class of a descriptor, or what makes a method

_DRESS = "_learnables_dress"
_classes: dict[tuple[type, Kind, str, frozenset[str]], type] = {}


def dress(owner: nn.Module, kind: Kind, key: str) -> None:
    """Give ``owner`` one ``kind(name)`` for each name that the dict ``owner.__dict__[key]`` has.

    Call it whenever the names have changed; without any, the class is the plain one again.
    """
    plain, layers = _undressed(type(owner))
    layers = [layer for layer in layers if layer[0] is not kind]
    owner.__class__ = _dressed(plain, [*layers, (kind, key, _names(owner, key))])


def _names(owner: nn.Module, key: str) -> frozenset[str]:
    return frozenset(owner.__dict__.get(key, ()))


def _undressed(cls: type) -> tuple[type, list[Any]]:
    """The plain class, and what lies on it, the innermost first."""
    layers: list[Any] = []
    while _DRESS in vars(cls):
        layers.insert(0, vars(cls)[_DRESS])
        cls = cls.__mro__[1]
    return cls, layers


def _dressed(cls: type, layers: list[Any]) -> type:
    for kind, key, names in layers:
        cls = _with_descriptors(cls, kind, key, names) if names else cls
    return cls


def _with_descriptors(plain: type, kind: Kind, key: str, names: frozenset[str]) -> type:
    if (plain, kind, key, names) not in _classes:
        body: dict[str, Any] = {name: kind(name) for name in names}
        body |= {_DRESS: (kind, key, names), "__module__": plain.__module__}
        body |= {"__doc__": plain.__doc__, "__qualname__": plain.__qualname__}
        body["__reduce_ex__"] = _reducer(plain, kind, key)
        _classes[plain, kind, key, names] = type(plain.__name__, (plain,), body)
    return _classes[plain, kind, key, names]


def _reducer(plain: type, kind: Kind, key: str) -> Any:
    reduce_plain: Any = plain.__reduce_ex__

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle as the plain class; the descriptors come back with the state."""
        make, args, *rest = reduce_plain(self, protocol)
        args = tuple(plain if arg is type(self) else arg for arg in args)
        return (_remake, (make, args, kind, key, _names(self, key)), *rest)

    return reduce


def _remake(
    make: Any, args: tuple[Any, ...], kind: Kind, key: str, names: frozenset[str]
) -> nn.Module:
    module: nn.Module = make(*args)
    module.__class__ = _dressed(type(module), [(kind, key, names)])
    return module
