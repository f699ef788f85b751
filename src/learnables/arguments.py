"""What a caller handed over is what was asked for; said before anything is done with it."""

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from math import inf, isfinite
from numbers import Real
from operator import index
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables.errors import ArgumentError, LearnablesError, PolicyError

_P = ParamSpec("_P")
_R = TypeVar("_R")


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


def require_share(value: float, name: str) -> None:
    """Refuse what is no part of a whole, as a probability and a dropout are.

    Raises:
        ArgumentError: It is no number; the argument is named.
        PolicyError: It lies outside [0, 1].
    """
    require_number(value, name)
    if not 0 <= value <= 1:
        raise PolicyError(
            f"{name} is no share of a whole",
            where=name,
            found=f"{name}={value}",
            wanted=f"0 ≤ {name} ≤ 1",
        )


def require_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse what is not among ``choices``.

    Raises:
        LearnablesError: It is not.
    """
    if value not in choices:
        texts = [choice for choice in choices if isinstance(choice, str)]
        near = difflib.get_close_matches(str(value), texts, n=1)
        raise LearnablesError(
            f"{name} is none of its choices",
            where=name,
            found=f"{name}={value!r}",
            wanted=f"one of {', '.join(map(repr, choices))}",
            mend=f"{name}={near[0]!r}" if near else "",
        )


def require_whole(value: object, name: str, *, least: int | None) -> int:
    """``value`` as an int; refuse what is no whole number, and one that is too small.

    Args:
        value: What was handed over.
        name: The argument.
        least: The smallest that means something; None where any does.

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
            wanted="an int" if least is None else f"an int, at least {least}",
            mend=_towards_an_int(value, name, least),
        )
    if least is not None and whole < least:
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


def require_dtype(value: object, name: str) -> None:
    """Refuse what is no dtype, such as ``"bf16"``.

    Raises:
        ArgumentError: It is none; the argument is named.
    """
    if not isinstance(value, torch.dtype):
        raise ArgumentError(
            f"{name} is no dtype",
            where=name,
            found=describe(value),
            wanted="a torch.dtype, e.g. torch.bfloat16",
            mend=towards_a_dtype(value, name),
        )


def require_device(value: object, name: str) -> None:
    """Refuse what names no device, such as ``"gpu"``; whether it is there shows when it is used.

    Raises:
        ArgumentError: It names none; the argument is named.
    """
    try:
        torch.device(value)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise ArgumentError(
            f"{name} names no device",
            where=name,
            found=describe(value),
            wanted="a torch.device, or its name, e.g. 'cpu' or 'cuda:0'",
            mend=f"{name}='cuda'" if value == "gpu" else "",
        ) from None


def require_pair(value: object, name: str, *, or_one: bool) -> None:
    """Refuse what is not two whole numbers nor, with ``or_one``, one that stands for both.

    Raises:
        ArgumentError: It is neither; the argument is named.
        LearnablesError: One is negative.
    """
    pair = value if isinstance(value, (tuple, list)) else (value, value) if or_one else ()
    try:
        for whole in pair:
            require_whole(whole, name, least=None)
    except ArgumentError:
        pair = ()
    if len(pair) != 2:
        raise ArgumentError(
            f"{name} is neither a whole number nor two" if or_one else f"{name} is no pair",
            where=name,
            found=describe(value),
            wanted="an int, or a tuple of two" if or_one else "a tuple of two ints",
        )
    if min(pair) < 0:
        raise LearnablesError(
            f"{name} is negative", where=name, found=f"{name}={value}", wanted="≥ 0"
        )


def require_function(value: object, name: str) -> None:
    """Refuse what cannot be called, such as the name of an activation.

    Raises:
        ArgumentError: It cannot; the argument is named.
    """
    if not callable(value):
        known = isinstance(value, str) and callable(getattr(nn.functional, value, None))
        raise ArgumentError(
            f"{name} is no function",
            where=name,
            found=describe(value),
            wanted="a function or a module",
            mend=f"{name}=torch.nn.functional.{value}" if known else "",
        )


def require_names(value: object, name: str) -> None:
    """Refuse one text, whose letters would be taken for names, and what holds other than texts.

    Raises:
        ArgumentError: It is so; the argument is named.
    """
    listed = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
    if not listed or not all(isinstance(one, str) for one in value):  # type: ignore[attr-defined]
        raise ArgumentError(
            f"{name} is no list of names",
            where=name,
            found=describe(value),
            wanted="a list of str",
            mend=f"{name}=[{value!r}]" if isinstance(value, str) else "",
        )


def as_annotated(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let ``function`` refuse arguments of another kind than its signature says, before it runs."""

    @wraps(function)
    def judged(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        require_as_annotated(function, args, kwargs)
        return function(*args, **kwargs)

    return judged


def require_as_annotated(
    made: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Refuse what the signature of a class or function of ours takes for another kind.

    Read from it: numbers, sizes (which are not negative, unless the default is), truths, texts,
    pairs, dtypes, devices, paths, mappings, lists of names, functions and instances of one class.
    What is annotated in any other way, or does not fit at all, is for the callee to refuse.

    Args:
        made: What is called; what is not ours is let through, since annotations bind nobody.
        args: What it is called with.
        kwargs: The same, by name.

    Raises:
        ArgumentError: A value is of another kind; the argument is named.
        LearnablesError: A size is negative.

    Cost:
        Some 10 µs.
    """
    if not made.__module__.startswith("learnables.") or not (args or kwargs):
        return
    signature = _signature(made)
    try:
        handed = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:
        return  # Python's own words are the clearest
    for name, value in handed.items():
        takes = signature.parameters[name]
        kinds = frozenset(_kinds(takes.annotation))
        if takes.kind is takes.VAR_POSITIONAL or (value is None and NoneType in kinds):
            continue
        kinds -= {NoneType}
        if kinds in _CHECKS:
            counts_back = isinstance(takes.default, int) and takes.default < 0
            _CHECKS[kinds](value, name, counts_back)
        elif len(kinds) == 1 and isinstance(kind := next(iter(kinds)), type) and kind is not Any:
            wanted = f"an instance of {kind.__qualname__}"
            require_kind(value, name, kind, wanted=wanted, mend=_towards_an_instance(value, name))


@cache
def _signature(made: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(made)


@cache
def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The parts of a union; of ``Callable[[int], int]`` only what it is."""
    if isinstance(annotation, UnionType):
        return tuple(kind for part in get_args(annotation) for kind in _kinds(part))
    origin = get_origin(annotation)
    return (origin,) if origin in (Callable, Mapping) else (annotation,)


def _require_size(value: object, name: str, counts_back: bool) -> None:
    """Refuse what is no whole number and, unless it counts from the end, a negative one.

    Raises:
        LearnablesError: It is negative.
    """
    if require_whole(value, name, least=None) < 0 and not counts_back:
        raise LearnablesError(
            f"{name} is negative", where=name, found=f"{name}={value}", wanted="≥ 0"
        )


def _towards_an_instance(value: object, name: str) -> str:
    return f"{name}={value.__name__}(…)" if isinstance(value, type) else ""


def _require_mapping(value: object, name: str, _: bool) -> None:
    require_kind(value, name, Mapping, wanted="a mapping of names", mend=f"{name}={{}}")


_Check = Callable[[Any, str, bool], None]
_CHECKS: dict[frozenset[Any], _Check] = {
    frozenset({float}): lambda value, name, _: require_number(value, name),
    frozenset({int}): _require_size,
    frozenset({bool}): lambda value, name, _: require_flag(value, name),
    frozenset({str}): lambda value, name, _: require_text(value, name),
    frozenset({int, tuple[int, int]}): lambda value, name, _: require_pair(
        value, name, or_one=True
    ),
    frozenset({tuple[int, int]}): lambda value, name, _: require_pair(value, name, or_one=False),
    frozenset({torch.dtype}): lambda value, name, _: require_dtype(value, name),
    frozenset({torch.device, str}): lambda value, name, _: require_device(value, name),
    frozenset({nn.Module}): lambda value, name, _: require_module(value, name),
    frozenset({Mapping}): _require_mapping,
    frozenset({Sequence[str]}): lambda value, name, _: require_names(value, name),
    frozenset({str, Path}): lambda value, name, _: require_path(
        value, name, wanted="a str or a pathlib.Path", mend=f"{name}='runs/here'"
    ),
    frozenset({Callable}): lambda value, name, _: require_function(value, name),
}


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


def towards_a_dtype(value: object, name: str) -> str:
    """What to type instead of the name of a dtype such as ``"bf16"``, or nothing."""
    said = str(value).removeprefix("torch.")
    kind = getattr(torch, _SHORT_DTYPES.get(said, said), None)
    return f"{name}={kind}" if isinstance(kind, torch.dtype) else ""


_SHORT_DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _is_number(text: object) -> bool:
    try:
        return isinstance(text, str) and isfinite(float(text))
    except ValueError:
        return False


def _is_optimizer(value: object) -> bool:
    # An engine's optimizer need not inherit from torch's; its groups are what we read.
    return isinstance(value, Optimizer) or hasattr(value, "param_groups")


def _towards_an_int(value: Any, name: str, least: int | None) -> str:
    try:
        whole = int(value) if least is None else max(least, int(value))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return "" if least is None else f"{name}={least}"
    return f"{name}={whole}"


def _towards_a_module(value: object, name: str) -> str:
    if isinstance(value, type) and issubclass(value, nn.Module):
        return f"{name} = {value.__name__}(…)"
    modules = isinstance(value, (list, tuple)) and all(isinstance(m, nn.Module) for m in value)
    return f"{name} = nn.ModuleList({name})" if modules and value else ""
