"""Pick entries of a model by name, type, shape or tag; an empty pick is an error."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

from learnables.arguments import describe
from learnables.entries import Entry
from learnables.errors import ArgumentError, SelectionError

Selector: TypeAlias = (
    "str | re.Pattern[str] | type[nn.Module] | nn.Parameter | Callable[[Entry], bool]"
    " | Iterable[Selector]"
)


def select(entries: Sequence[Entry], selector: Selector) -> tuple[Entry, ...]:
    """The entries that ``selector`` names, in the order of the walk.

    Args:
        entries: What to choose from.
        selector: One of, or a list (meaning *any of*) of:

            * a glob over the qualified name, with or without the prefixes that wrappers add:
              ``"blocks.*.gamma"``, ``"*"``; ``"tag:prompt"`` for a declared tag;
              a leading ``!`` in a list removes what it matches;
            * a compiled pattern, searched in the qualified name;
            * a module class: the parameters its instances own;
            * a Parameter, by identity;
            * a function of the entry, e.g. ``lambda entry: entry.param.ndim == 2``.

    Raises:
        ArgumentError: ``selector`` is none of these.
        SelectionError: Nothing is picked; the message offers the nearest names.

    Example:
        >>> from learnables.entries import entries
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> [entry.name for entry in select(entries(model), ["*.weight", "!1.*"])]
        ['0.weight']
    """
    selector = settled(selector)
    chosen = [entry for entry in entries if _matches(entry, selector)]
    if not chosen:
        raise SelectionError(
            "the selector picks no parameter",
            found=f"{_show(selector)} over {len(entries)} parameters",
            wanted="at least one match",
            mend=_nearest(entries, selector),
        )
    return tuple(chosen)


def settled(selector: Selector) -> Selector:
    """The selector as it can be asked of each entry: a generator would be spent after the first.

    Raises:
        ArgumentError: It, or a part of it, is no selector.
    """
    if isinstance(selector, (str, re.Pattern, nn.Parameter, type)):
        return selector
    if callable(selector) and not isinstance(selector, nn.Module):
        return selector
    if isinstance(selector, Iterable) and not isinstance(selector, (nn.Module, Tensor, bytes)):
        return [settled(part) for part in selector]
    raise ArgumentError(
        "this is no selector",
        where="selector",
        found=describe(selector),
        wanted="a glob, a compiled pattern, a module class, a Parameter, a function of the entry, "
        "or several",
        mend="'*' for all parameters; ln.inventory(model) lists them",
    )


def _matches(entry: Entry, selector: Selector) -> bool:
    if isinstance(selector, str):
        if selector.startswith("tag:"):
            return any(selector[4:] in (p.note.get("tags") or ()) for p in entry.places)
        names = {*entry.names, *entry.plain_names}
        return any(name == selector or fnmatchcase(name, selector) for name in names)
    if isinstance(selector, re.Pattern):
        return any(selector.search(name) for name in (*entry.names, *entry.plain_names))
    if isinstance(selector, nn.Parameter):
        return entry.param is selector
    if isinstance(selector, type):
        return any(isinstance(place.owner, selector) for place in entry.places)
    if callable(selector):
        return bool(selector(entry))
    wanted = [s for s in selector if not (isinstance(s, str) and s.startswith("!"))]
    unwanted = [s[1:] for s in selector if isinstance(s, str) and s.startswith("!")]
    return any(_matches(entry, s) for s in wanted) and not any(_matches(entry, s) for s in unwanted)


def _show(selector: Selector) -> str:
    if isinstance(selector, type):
        return selector.__qualname__
    if isinstance(selector, nn.Parameter):
        return f"a Parameter of shape {tuple(selector.shape)} that the model does not hold"
    return repr(selector)


def _nearest(entries: Sequence[Entry], selector: Selector) -> str:
    names = [name for entry in entries for name in entry.plain_names]
    if not names:
        return "the model has no parameter"
    texts = [selector] if isinstance(selector, str) else []
    if isinstance(selector, Iterable) and not isinstance(selector, str):
        texts = [s for s in selector if isinstance(s, str)]
    close = [
        n for text in texts for n in difflib.get_close_matches(text.strip("*!"), names, 3, 0.4)
    ]
    return f"one of {', '.join(map(repr, close or names[:3]))}; ln.inventory(model) lists all"
