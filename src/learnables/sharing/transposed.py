"""A module one of whose parameters is the transpose of another module's."""

from typing import Any

from torch import Tensor, nn

from learnables.errors import ConstraintError

_SOURCES = "_learnables_transposed"
_classes: dict[tuple[type, frozenset[str]], type] = {}


class _Transpose:
    """The property that stands for the parameter: read-only, always of the source's value."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, _: type | None = None) -> Any:
        if module is None:
            return self
        source, name = module.__dict__[_SOURCES][self.name]
        value: Tensor = getattr(source, name)
        return value.mT

    def __set__(self, module: nn.Module, value: object) -> None:
        raise ConstraintError(
            "this parameter is the transpose of another and cannot be assigned to",
            where=self.name,
            found=type(value).__name__,
            wanted="an assignment to the source, or no tie",
            mend=f"ln.untie(model, {self.name!r})",
        )


def make_transposed(owner: nn.Module, local_name: str, source: nn.Module, name: str) -> None:
    """Replace the parameter ``local_name`` of ``owner`` by the transpose of the source's."""
    owner._parameters.pop(local_name, None)
    sources = owner.__dict__.setdefault(_SOURCES, {})
    sources[local_name] = (source, name)
    _dress(owner)


def unmake_transposed(owner: nn.Module, local_name: str) -> None:
    """Take the property away again; nothing stands in its place."""
    del owner.__dict__[_SOURCES][local_name]
    _dress(owner)


def is_transposed(owner: nn.Module, local_name: str) -> bool:
    """Whether ``local_name`` is such a property of ``owner``."""
    return local_name in owner.__dict__.get(_SOURCES, {})


def _dress(owner: nn.Module) -> None:
    """Give ``owner`` the subclass that has its properties, as torch's parametrizations do."""
    plain = type(owner)
    plain = plain.__mro__[1] if getattr(plain, "_is_transposed", False) else plain
    owner.__class__ = _with_properties(plain, frozenset(owner.__dict__.get(_SOURCES, {})))


def _with_properties(plain: type, names: frozenset[str]) -> type:
    if not names:
        return plain
    if (plain, names) not in _classes:
        body: dict[str, Any] = {name: _Transpose(name) for name in names}
        body |= {"_is_transposed": True, "__module__": plain.__module__, "__doc__": plain.__doc__}
        body |= {"__qualname__": plain.__qualname__, "__reduce_ex__": _reducer(plain)}
        _classes[plain, names] = type(plain.__name__, (plain,), body)
    return _classes[plain, names]


def _reducer(plain: type) -> Any:
    reduce_plain: Any = plain.__reduce_ex__

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle as the plain class; the properties come back with the state."""
        make, args, *rest = reduce_plain(self, protocol)
        args = tuple(plain if arg is type(self) else arg for arg in args)
        return (_remake, (make, args, frozenset(self.__dict__[_SOURCES])), *rest)

    return reduce


def _remake(make: Any, args: tuple[Any, ...], names: frozenset[str]) -> nn.Module:
    module: nn.Module = make(*args)
    module.__class__ = _with_properties(type(module), names)
    return module
