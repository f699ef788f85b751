"""What a caller handed over is what was asked for; said before anything is done with it."""

import os
from collections.abc import Iterable
from math import inf, isfinite
from numbers import Real
from operator import index
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from learnables.errors import ArgumentError, LearnablesError, PolicyError


def require_module(model: object, name: str = "model") -> None:
    """Refuse what is no module, such as a list of modules, a class, or a state dict.

    Raises:
        ArgumentError: It is no ``nn.Module``; the message names the argument.
    """
    if isinstance(model, nn.Module):
        return
    raise ArgumentError(
        f"{name} is no module",
        where=name,
        found=describe(model),
        wanted="a torch.nn.Module",
        mend=_towards_a_module(model, name),
    )


def require_text(value: object, name: str) -> None:
    """Refuse what is no text where a name is asked for.

    Raises:
        ArgumentError: It is no ``str``; the message names the argument.
    """
    if not isinstance(value, str):
        raise ArgumentError(
            f"{name} is no text", where=name, found=describe(value), wanted="a name, as a str"
        )


def require_number(value: object, name: str) -> None:
    """Refuse what is no number; YAML, for one, reads ``1e-3`` as text.

    Raises:
        ArgumentError: It is neither a real number nor a tensor of one (True and False are none);
            the argument is named.
    """
    is_one = isinstance(value, Tensor) and value.numel() == 1
    if isinstance(value, bool) or (not is_one and not isinstance(value, Real)):
        raise ArgumentError(
            f"{name} is no number",
            where=name,
            found=describe(value),
            wanted="a float",
            mend=f"{name}=float({value!r})" if _is_number(value) else "",
        )


def require_at_least_zero(value: object, name: str) -> None:
    """Refuse what is no finite number of zero or more, which no rate and no coefficient is.

    Raises:
        ArgumentError: It is no number; the argument is named.
        PolicyError: It is negative, infinite or not a number.
    """
    require_number(value, name)
    number = float(value)  # type: ignore[arg-type]
    if not 0 <= number < inf:
        raise PolicyError(
            f"{name} has a value that means nothing",
            where=name,
            found=f"{name}={number:g}",
            wanted="a finite number ≥ 0",
            mend=f"{name}={-number:g}" if -inf < number < 0 else "",
        )


def require_whole(value: object, name: str, *, least: int) -> int:
    """``value`` as an int; refuse what is no whole number, and one that is too small.

    Raises:
        ArgumentError: It is no integer (True and False are none); the argument is named.
        LearnablesError: It is below ``least``.
    """
    try:
        whole = None if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        whole = None
    if whole is None:
        raise ArgumentError(
            f"{name} is no whole number",
            where=name,
            found=describe(value),
            wanted=f"an int, at least {least}",
            mend=f"{name}={_towards_an_int(value, least)}",
        )
    if whole < least:
        raise LearnablesError(
            f"{name} is too small",
            where=name,
            found=f"{name}={whole}",
            wanted=f"at least {least}",
            mend=f"{name}={least}",
        )
    return whole


def require_flag(value: object, name: str) -> None:
    """Refuse what is neither True nor False, such as ``"no"``, which Python takes for true.

    Raises:
        ArgumentError: It is no ``bool``; the message names the argument.
    """
    if not isinstance(value, bool):
        raise ArgumentError(
            f"{name} is neither True nor False",
            where=name,
            found=describe(value),
            wanted="a bool",
            mend=f"{name}=True",
        )


def require_path(value: object, name: str, *, wanted: str, mend: str) -> None:
    """Refuse what names no place in the file system.

    Args:
        value: What was handed over.
        name: The argument.
        wanted: What it takes.
        mend: What to type.

    Raises:
        ArgumentError: It is no text and no path, or an empty one; the argument is named.
    """
    if isinstance(value, (str, os.PathLike)) and isinstance(os.fspath(value), str) and str(value):
        return
    raise ArgumentError(
        f"{name} is no path", where=name, found=describe(value), wanted=wanted, mend=mend
    )


def require_kind(value: object, name: str, *kinds: type, wanted: str, mend: str) -> None:
    """Refuse what is of none of ``kinds``.

    Args:
        value: What was handed over.
        name: The argument.
        kinds: The classes that it takes.
        wanted: What it takes, in words.
        mend: What to type.

    Raises:
        ArgumentError: It is of another class; the argument is named.
    """
    if not isinstance(value, kinds):
        raise ArgumentError(
            f"{name} is of another kind",
            where=name,
            found=describe(value),
            wanted=wanted,
            mend=mend,
        )


def optimizers_in(optimizer: "Optimizer | Iterable[Optimizer] | None") -> list[Optimizer]:
    """The optimizers of an argument that takes one, several or none.

    Raises:
        ArgumentError: There is something among them that is no optimizer.
    """
    if optimizer is None:
        return []
    several = isinstance(optimizer, Iterable) and not _is_optimizer(optimizer)
    found: list[Optimizer] = list(optimizer) if several else [optimizer]  # type: ignore[arg-type,list-item]
    for one in found:
        if not _is_optimizer(one):
            raise ArgumentError(
                "what was handed over as optimizer is none",
                where="optimizer",
                found=describe(optimizer),
                wanted="a torch.optim.Optimizer, or several",
                mend="optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3))",
            )
    return found


def describe(value: object) -> str:
    """What ``value`` is, in a few words: ``a list of Linear``, ``the class Linear``, ``None``."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    kind = type(value).__qualname__
    if isinstance(value, (list, tuple, set)):
        kinds = list(dict.fromkeys(type(item).__qualname__ for item in value))
        return f"a {kind} of {', '.join(kinds[:3])}" if kinds else f"an empty {kind}"
    short = repr(value) if isinstance(value, (str, int, float, bytes)) else ""
    return f"{short[:40]}, of type {kind}" if short else f"of type {kind}"


def _is_number(text: object) -> bool:
    try:
        return isinstance(text, str) and isfinite(float(text))
    except ValueError:
        return False


def _is_optimizer(value: object) -> bool:
    # An engine's optimizer need not inherit from torch's; its groups are what we read.
    return isinstance(value, Optimizer) or hasattr(value, "param_groups")


def _towards_an_int(value: Any, least: int) -> int:
    try:
        return max(least, int(value))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return least


def _towards_a_module(value: object, name: str) -> str:
    if isinstance(value, type) and issubclass(value, nn.Module):
        return f"{name} = {value.__name__}(…)"
    modules = isinstance(value, (list, tuple)) and all(isinstance(m, nn.Module) for m in value)
    return f"{name} = nn.ModuleList({name})" if modules and value else ""
