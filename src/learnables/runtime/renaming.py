"""Names in a file and names in a model: maps, and the prefixes that other people's code adds."""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeAlias, final

from learnables._torch import without_wrappers
from learnables.arguments import require_function
from learnables.errors import CheckpointError

Rename: TypeAlias = "Mapping[str, str] | Callable[[str], str] | None"
_HELD_AS = "model."  # how a LightningModule and many others call the model that they hold


@final
class Renaming:
    """Name in the file → name in the model.

    Wrappers' prefixes (``module.``, ``_orig_mod.``) are gone before: neither side has them.

    Args:
        names: All names of the file.
        own: All names of the model.
        rename: What the user said. A mapping has whole names, or prefixes that end with ``.*``
            on both sides (``"*"`` for none), of which the longest that fits counts.

    Raises:
        CheckpointError: A key of the mapping fits no name of the file, or two names become one.

    Attributes:
        changed: Old → new, of those that differ.

    Example:
        >>> renaming = Renaming(["encoder.0.weight"], [], {"encoder.*": "trunk.*"})
        >>> renaming("encoder.0.weight"), renaming("encoder.0.bias")
        ('trunk.0.weight', 'trunk.0.bias')
        >>> Renaming(["model.weight"], ["weight"]).changed
        {'model.weight': 'weight'}
    """

    def __init__(self, names: Collection[str], own: Collection[str], rename: Rename = None) -> None:
        self._rename, self._cut, self._added = rename, "", ""
        if isinstance(rename, Mapping):
            _check(rename, names)
        elif rename is not None:
            require_function(rename, "rename")
        found = {self(name) for name in names}
        if found and own and found.isdisjoint(own):
            if {name.removeprefix(_HELD_AS) for name in found} & set(own):
                self._cut = _HELD_AS
            elif {_HELD_AS + name for name in found} & set(own):
                self._added = _HELD_AS
        first: dict[str, str] = {}
        for name in names:
            other = first.setdefault(self(name), name)
            if other != name:
                raise CheckpointError(
                    "two names of the checkpoint become one",
                    where=f"{other}, {name}",
                    found=f"both are called {self(name)} after rename",
                    wanted="a name of its own for each",
                )
        self.changed = {name: self(name) for name in names if self(name) != name}

    def __call__(self, name: str) -> str:
        """What a name of the file, or of a module in it, is called in the model."""
        new = self._mapped(name).removeprefix(self._cut)
        return self._added + new

    def _mapped(self, name: str) -> str:
        if self._rename is None:
            return name
        if not isinstance(self._rename, Mapping):
            return self._rename(name)
        if name in self._rename:
            return self._rename[name]
        fitting = [key for key in self._rename if _is_prefix(key) and name.startswith(key[:-1])]
        if not fitting:
            return name
        key = max(fitting, key=len)
        return self._rename[key][:-1] + name[len(key) - 1 :]


def _is_prefix(key: str) -> bool:
    return key == "*" or key.endswith(".*")


def _check(rename: Mapping[str, str], names: Collection[str]) -> None:
    for key, new in rename.items():
        if _is_prefix(key) != _is_prefix(new):
            raise CheckpointError(
                "a prefix is renamed to a prefix, and a name to a name",
                found=f"rename={{{key!r}: {new!r}}}",
                wanted='{"encoder.*": "trunk.*"} or {"old.weight": "new.weight"}',
            )
        if not (key in names or (_is_prefix(key) and any(n.startswith(key[:-1]) for n in names))):
            near = difflib.get_close_matches(key.removesuffix(".*"), names, n=3, cutoff=0.4)
            raise CheckpointError(
                "rename names what the checkpoint does not hold",
                where=key,
                found=f"{len(names)} names; nearest: {', '.join(near) or 'none'}",
                wanted="a name of the checkpoint, or a prefix of one that ends with .*",
            )


def plain_names(keys: Iterable[str]) -> dict[str, str]:
    """Key → name without wrappers; the keys themselves where that would merge two of them."""
    names = {key: without_wrappers(key) for key in keys}
    return names if len(set(names.values())) == len(names) else {key: key for key in names}
