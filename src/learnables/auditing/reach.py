"""Walk over Python objects: what can be reached from a model, an optimizer or a ``step``.

The walk sees modules (their ``__dict__`` and their registries), containers, bound methods,
partials, closures, the globals that a function names, and plain instances. It does not run
properties, and it stops at large containers, foreign libraries and everything that is not data.
"""

import functools
import io
import random
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from learnables._torch import INTERNALS_OF_MODULES

LARGEST_CONTAINER = 4096
MOST_OBJECTS = 200_000
_ATOMS = (str, bytes, bytearray, int, float, complex, bool, type(None), type, types.ModuleType)
_TORCH_ACTORS = (nn.Module, Optimizer, LRScheduler, torch.amp.GradScaler)
_CLOSED = {*sys.stdlib_module_names, "torch", "numpy", "learnables"}


@dataclass(frozen=True, eq=False)
class Found:
    """One object of the walk.

    Attributes:
        value: The object.
        path: Names from the root to it.
        owner: The nearest module on the way.
        parent: The object that holds it.
        through: Which kinds of holder lie between the root and it.
    """

    value: Any
    path: tuple[str, ...]
    owner: nn.Module | None
    parent: Any
    through: frozenset[str]

    @property
    def name(self) -> str:
        """The path as one would type it: ``scales.0``."""
        return ".".join(part for part in self.path if part)


def reach(root: Any, name: str = "", *, internals: bool = False) -> Iterator[Found]:
    """Every object below ``root``, each once, breadth first.

    Args:
        root: Where to start.
        name: First part of all paths.
        internals: Whether to visit the registries of modules (``_parameters``, hooks, …) as the
            dicts they are, rather than as children of the module.
    """
    queue: deque[Found] = deque([Found(root, (name,), None, None, frozenset())])
    seen: dict[int, Any] = {}
    while queue and len(seen) < MOST_OBJECTS:
        found = queue.popleft()
        value = found.value
        if isinstance(value, _ATOMS) or id(value) in seen:
            continue
        seen[id(value)] = value  # kept alive, so that no identity is used twice
        yield found
        owner = value if isinstance(value, nn.Module) else found.owner
        for step, child, kind in _children(value, internals=internals, is_root=value is root):
            if not isinstance(child, _ATOMS) and id(child) not in seen:
                through = found.through | {kind} if kind else found.through
                queue.append(Found(child, (*found.path, step), owner, value, through))


def _children(value: Any, *, internals: bool, is_root: bool) -> Iterator[tuple[str, Any, str]]:
    """(step of the path, child, kind of holder) for everything directly inside ``value``."""
    if isinstance(value, nn.Module):
        yield from _of_module(value, internals=internals)
    elif isinstance(value, Tensor):
        if type(value) is not Tensor and getattr(value, "__dict__", None):
            yield from ((k, v, "object") for k, v in list(vars(value).items()))
    elif isinstance(value, Mapping):
        if isinstance(value, dict) and len(value) <= LARGEST_CONTAINER:
            for key, child in list(value.items()):
                yield (str(key) if isinstance(key, (str, int)) else "", child, "container")
                if isinstance(key, Tensor):
                    yield ("", key, "container")
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        if len(value) <= LARGEST_CONTAINER:
            for i, child in enumerate(list(value)):
                yield str(i), child, "container"
    elif isinstance(value, types.MethodType):
        yield "", value.__self__, ""
        yield "", value.__func__, ""
    elif isinstance(value, functools.partial):
        yield "", value.func, ""
        yield "", value.args, ""
        yield "", value.keywords, ""
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value, is_root=is_root)
    elif isinstance(value, types.CellType):
        with _Quiet():
            yield "", value.cell_contents, ""
    elif has_open_dict(value):
        yield from ((k, v, "object") for k, v in list(vars(value).items()))


def _of_module(module: nn.Module, *, internals: bool) -> Iterator[tuple[str, Any, str]]:
    for key, child in list(module.__dict__.items()):
        if internals:
            yield key, child, "attribute"
        elif key in ("_parameters", "_buffers", "_modules"):
            yield from ((k, v, "") for k, v in list(child.items()) if v is not None)
        elif key not in INTERNALS_OF_MODULES:
            yield key, child, "attribute"
        elif isinstance(child, dict) and child:
            yield from (("", hook, "hook") for hook in list(child.values()))


def _of_function(function: types.FunctionType, *, is_root: bool) -> Iterator[tuple[str, Any, str]]:
    if top_package(function.__module__) in _CLOSED - {"torch"}:
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        yield name, cell, "closure"
    for default in function.__defaults__ or ():
        yield "", default, "closure"
    if is_root or function.__module__ == "__main__":
        for name in globals_named(function.__code__):
            if name in function.__globals__:
                yield name, function.__globals__[name], "closure"


def globals_named(code: types.CodeType) -> list[str]:
    """Global names that a function uses, also in the functions inside it."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += globals_named(constant)
    return names


def has_open_dict(value: Any) -> bool:
    """Whether ``value`` is a plain instance whose attributes are somebody's data."""
    if isinstance(value, _TORCH_ACTORS):
        return True
    if isinstance(value, (types.BuiltinFunctionType, io.IOBase, torch.Generator, random.Random)):
        return False
    try:
        return (
            isinstance(object.__getattribute__(value, "__dict__"), dict)
            and top_package(type(value).__module__) not in _CLOSED
        )
    except AttributeError:
        return False


def top_package(module: str | None) -> str:
    """First part of a dotted module name."""
    return (module or "").partition(".")[0]


class _Quiet:
    """Swallow what an empty cell raises."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, ValueError)
