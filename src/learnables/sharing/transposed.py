"""A module one of whose parameters is the transpose of another module's."""

from typing import Any

from torch import Tensor, nn

from learnables.errors import ConstraintError
from learnables.sharing.descriptors import dress

_SOURCES = "_learnables_transposed"


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
    dress(owner, _Transpose, _SOURCES)


def unmake_transposed(owner: nn.Module, local_name: str) -> None:
    """Take the property away again; nothing stands in its place."""
    del owner.__dict__[_SOURCES][local_name]
    dress(owner, _Transpose, _SOURCES)


def is_transposed(owner: nn.Module, local_name: str) -> bool:
    """Whether ``local_name`` is such a property of ``owner``."""
    return local_name in owner.__dict__.get(_SOURCES, {})
