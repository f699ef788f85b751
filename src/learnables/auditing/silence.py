"""Findings that are meant: said once, with the reason, next to the code that means it."""

from collections.abc import Sequence
from dataclasses import dataclass

from learnables.auditing.rule import rules_named
from learnables.entries import Entry
from learnables.errors import LearnablesError, SelectionError
from learnables.select import Selector, select, settled


@dataclass(frozen=True, eq=False)
class Silence:
    """One declaration that findings of a rule about some parameters are meant.

    Attributes:
        code: A code, a prefix of codes (``"LRN3"``) or a rule's name.
        selector: Which parameters; a selector, or the name of a tensor that is no parameter.
        reason: Why.
    """

    code: str
    selector: Selector
    reason: str

    def remove(self) -> None:
        """Take the declaration back."""
        _SILENCES.remove(self)

    def names(self, entries: Sequence[Entry]) -> frozenset[str]:
        """The names it covers in a model with these entries."""
        plain = {self.selector} if isinstance(self.selector, str) else set()
        try:
            chosen = select(entries, self.selector)
        except SelectionError:  # it is about a tensor that is no parameter, or another model
            return frozenset(plain)
        return frozenset(plain | {name for entry in chosen for name in entry.names})


_SILENCES: list[Silence] = []


def silence(code: str, selector: Selector, reason: str) -> Silence:
    """Declare that findings of rule ``code`` about ``selector`` are meant.

    Holds for every audit of this process, until the returned object's ``remove()``.

    Args:
        code: A code, a prefix of codes (``"LRN3"``) or a rule's name.
        selector: Which parameters, as for `ln.annotate`.
        reason: Why this is meant; shown by the report. It must not be empty.

    Raises:
        ArgumentError: ``selector`` is no selector.
        LearnablesError: No reason is given, or there is no such rule.

    Example:
        >>> import learnables as ln
        >>> meant = ln.silence("LRN201", "teacher.*", reason="updated by hand as an average")
        >>> meant.remove()
    """
    if not isinstance(reason, str) or not reason.strip():
        raise LearnablesError(
            "a finding is silenced without a reason",
            found=f"ln.silence({code!r}, {selector!r}, reason={reason!r})",
            wanted="a reason that the next reader understands",
        )
    rules_named(code)
    _SILENCES.append(Silence(code, settled(selector), reason))
    return _SILENCES[-1]


def silences() -> tuple[Silence, ...]:
    """All that are in force."""
    return tuple(_SILENCES)
