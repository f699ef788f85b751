"""Call a function of the user's that builds what is to be audited: ``pkg.module:factory``."""

import difflib
import importlib
import importlib.util
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from learnables._torch import memory_filled_with_nan
from learnables.auditing.intent import Intent, Loaded
from learnables.auditing.places import is_users
from learnables.errors import LearnablesError

_KEYWORDS = (
    "model",
    "optimizer",
    "step",
    "optimizers",
    "modules",
    "scaler",
    "scheduler",
    "ddp",
    "copies",
    "batch",
    "loaded",
    "intent",
)


class UsersError(Exception):
    """Something of the user's raised; `told` is the traceback Python would have printed.

    Attributes:
        error: What was raised.
    """

    def __init__(self, error: BaseException) -> None:
        self.error = error
        super().__init__(str(error))

    @property
    def told(self) -> str:
        """The traceback without the frames that lead up to the user's code."""
        return told(self.error)


def told(error: BaseException) -> str:
    """The traceback of ``error`` from the first frame of the user's code on."""
    return "".join(traceback.format_exception(type(error), error, trimmed(error)))


def trimmed(error: BaseException) -> TracebackType | None:
    """The traceback of ``error`` without the frames that lead up to the user's code."""
    at = error.__traceback__
    while at is not None and not _is_theirs(at.tb_frame.f_code.co_filename):
        at = at.tb_next
    return at


def _is_theirs(filename: str) -> bool:
    if filename.startswith("<") or filename in (importlib.__file__, runpy.__file__):
        return False
    return is_users(filename)


def import_factory(target: str) -> Any:
    """The object that ``pkg.module:name`` or ``path/to/file.py:name`` means.

    The working folder is searched first, as ``python -m`` does.

    Raises:
        LearnablesError: ``target`` has another form, the file does not exist, or the module has no
            such name.
        UsersError: The module raised while it was imported.
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise LearnablesError(
            "this names no factory",
            found=repr(target),
            wanted="pkg.module:factory or file.py:factory",
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    found: Any = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            raise LearnablesError(
                "the module has no such name",
                where=place,
                found=repr(part),
                wanted=f"a function that returns a model; is {near[0]!r} meant?"
                if near
                else "a function that returns a model",
            )
        found = getattr(found, part)
    return found


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the user's module raises is shown as Python shows it
        raise UsersError(error) from None


def _import_file(file: Path) -> Any:
    if not file.is_file():
        raise LearnablesError("there is no such file", found=str(file), wanted="a Python file")
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(file.stem, file.resolve())
    if spec is None or spec.loader is None:
        raise LearnablesError("this is no Python file", found=str(file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's module raises is shown as Python shows it
        raise UsersError(error) from None
    return module


def build(target: str) -> dict[str, Any]:
    """Arguments for `ln.audit`, by name, from what the factory returns.

    While the factory runs, memory that torch hands out uninitialised is NaN, so that a parameter
    that no line fills is found each time, and not only where the memory held garbage.

    It returns a model; or a tuple of a model with, in any order, optimizers, a scheduler, a scaler,
    an `Intent`, a `Loaded` and the ``step``; or a dict of arguments of `ln.audit`.

    Args:
        target: As for `import_factory`; a model in a global is taken as it is.

    Raises:
        LearnablesError: It returns something else.
        UsersError: It raised.
    """
    made = import_factory(target)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise LearnablesError(**_nothing(target, made))
        made = _called(made)
    if isinstance(made, dict):
        unknown = sorted(set(map(str, made)) - set(_KEYWORDS))
        if unknown or not isinstance(made.get("model"), nn.Module):
            found = f"keys {', '.join(map(str, made))}"
            wanted = f'"model" and, if you like, {", ".join(_KEYWORDS[1:])}'
            raise LearnablesError(
                "the factory returns a dict that is no argument list",
                where=target,
                found=found,
                wanted=wanted,
            )
        return dict(made)
    arguments: dict[str, Any] = {}
    for part in _flat(made):
        name = _name_of(part, arguments)
        if name is None:
            raise LearnablesError(**_nothing(target, part))
        if name == "optimizers":
            arguments.setdefault("optimizers", []).append(part)
        else:
            arguments[name] = part
    if "model" not in arguments:
        raise LearnablesError(**_nothing(target, made))
    return arguments


def _called(factory: Callable[[], Any]) -> Any:
    try:
        with memory_filled_with_nan():
            return factory()
    except Exception as error:  # whatever the user's factory raises is shown as Python shows it
        raise UsersError(error) from None


def _flat(made: Any) -> list[Any]:
    if isinstance(made, (tuple, list)):
        return [part for item in made for part in _flat(item)]
    return [] if made is None else [made]


def _name_of(part: Any, arguments: dict[str, Any]) -> str | None:
    if isinstance(part, nn.Module):
        name = "model"
    elif isinstance(part, Optimizer):
        return "optimizers"
    elif isinstance(part, LRScheduler):
        name = "scheduler"
    elif isinstance(part, torch.amp.GradScaler):
        name = "scaler"
    elif isinstance(part, (Intent, Loaded)):
        name = type(part).__name__.lower()
    elif callable(part):
        name = "step"
    else:
        return None
    return None if name in arguments else name


def _nothing(target: str, made: Any) -> dict[str, str]:
    return {
        "what": "the factory returns nothing that can be audited",
        "where": target,
        "found": f"{type(made).__module__}.{type(made).__qualname__}",
        "wanted": "a model, or (model, optimizer, step), or a dict of arguments of ln.audit",
    }
