"""Replace attributes for the length of a ``with``, and put every one back exactly as it was."""

from collections.abc import Callable
from typing import Any

_MISSING = object()


class Patches:
    """A stack of replacements; `undo` restores them in reverse order."""

    def __init__(self) -> None:
        self._done: list[Callable[[], None]] = []

    def wrap(self, holder: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Replace ``holder.name`` by ``make(original)``.

        A class keeps what was inherited inherited: the attribute is deleted again on `undo` where
        the class itself did not define it.
        """
        own = vars(holder).get(name, _MISSING)
        setattr(holder, name, make(getattr(holder, name)))

        def back() -> None:
            if own is _MISSING:
                delattr(holder, name)
            else:
                setattr(holder, name, own)

        self._done.append(back)

    def on_exit(self, undo: Callable[[], Any]) -> None:
        """Call ``undo`` with the others, e.g. a hook handle's ``remove``."""
        self._done.append(undo)

    def undo(self) -> None:
        """Put everything back; every step is tried, the first error is raised at the end."""
        first: BaseException | None = None
        while self._done:
            try:
                self._done.pop()()
            except Exception as error:  # the others must still be undone
                first = first or error
        if first is not None:
            raise first
