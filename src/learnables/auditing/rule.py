"""A rule is a function with a code and a docstring. Adding a file to ``rules/`` adds a rule."""

import difflib
import importlib
import inspect
import linecache
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from learnables.arguments import describe
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.places import shown
from learnables.errors import ArgumentError, LearnablesError, lay_out
from learnables.watching.sinks.escape import visible

_T = TypeVar("_T")
Severity: TypeAlias = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

FAMILIES = {
    "1": "registration",
    "2": "optimizer",
    "3": "gradient",
    "4": "update and loop",
    "5": "numerics and initialisation",
    "6": "precision and layout",
    "7": "sharing and constraints",
    "8": "checkpoint and naming",
    "9": "distributed and compile",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, said in the words of `LearnablesError`.

    A rule fills in what it knows; code, name and, where the rule left it out, severity are added
    by the runner.

    Attributes:
        code: The rule's code, e.g. ``LRN201``.
        name: The rule's name, e.g. ``missing-from-optimizer``.
        severity: ``"error"``, ``"warning"`` or ``"note"``.
        what: One declarative sentence, without advice.
        where: Qualified names of the parameters it is about; a tied one lists all its names.
        found: What was seen.
        wanted: What would have been right; the same kind of quantity.
        mend: A call to type, with ``model`` and ``optimizer`` as its only free names.
        location: ``file:line`` of the user's code that did it, where that is known.
    """

    code: str = ""
    name: str = ""
    severity: Severity | None = None
    what: str
    where: list[str]
    found: str = ""
    wanted: str = ""
    mend: str = ""
    location: str | None = None

    @property
    def quote(self) -> str:
        """The source line at `location`, stripped; empty where it cannot be read."""
        return quote(self.location)

    def __str__(self) -> str:
        """Write the finding as the console shows it."""
        at = visible(shown(self.location))
        if at and self.quote:
            at = f"{at}  {visible(self.quote)}"
        return lay_out(
            visible(f"{self.code} {self.what}".strip()),
            where=", ".join(map(visible, self.where)),
            at=at,
            found=visible(self.found),
            wanted=visible(self.wanted),
            mend="\n        ".join(map(visible, self.mend.split("\n"))),
        )


def quote(location: str | None) -> str:
    """The source line at ``file:line``, stripped; also of a notebook cell."""
    file, _, line = (location or "").rpartition(":")
    return linecache.getline(file, int(line)).strip() if line.isdigit() else ""


class SkipRule(Exception):  # noqa: N818 - reads as what to do
    """Raised by a rule that cannot judge; its text is the reason shown in ``report.skipped``."""


def needed(value: _T | None, what: str) -> _T:
    """``value``; where it is None or empty, the rule at work is skipped for want of ``what``.

    Raises:
        SkipRule: It is.
    """
    if value is None or (isinstance(value, Sized) and len(value) == 0):
        raise SkipRule(f"needs {what}")
    return value


Check: TypeAlias = Callable[[Evidence], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    """A check together with what the runner has to know about it.

    Attributes:
        code: ``LRN`` and three digits; the first is the family.
        name: The bad pattern, e.g. ``missing-from-optimizer``.
        needs: The stage of evidence without which it is skipped.
        severity: What its findings have when they do not say otherwise.
        subsumes: Codes, or prefixes of codes, of rules whose finding about the same parameter this
            one explains; the runner then drops theirs.
        check: The function.
    """

    code: str
    name: str
    needs: Stage
    severity: Severity
    subsumes: tuple[str, ...]
    check: Check

    @property
    def title(self) -> str:
        """First line of the page: what is bad, in a few words."""
        return (inspect.getdoc(self.check) or "").partition("\n")[0]

    @property
    def page(self) -> str:
        """The documentation page: title line plus the docstring of the check."""
        return f"# {self.name} ({self.code})\n\n{inspect.getdoc(self.check)}\n"

    def example(self, heading: str) -> str:
        """The Python block that follows ``## heading`` on the page.

        Raises:
            LookupError: The page has no such block.
        """
        found = re.search(rf"## {heading}\n+```python\n(.*?)```", self.page, re.DOTALL)
        if found is None:
            raise LookupError(f"{self.code} has no python block under '## {heading}'")
        return found.group(1)


_RULES: dict[str, Rule] = {}


def rule(
    code: str,
    *,
    needs: Stage,
    severity: Severity = "error",
    subsumes: tuple[str, ...] = (),
) -> Callable[[Check], Check]:
    """Register the decorated check under ``code``; its name becomes the rule's name."""

    def register(check: Check) -> Check:
        known = _RULES.get(code)
        if known is not None and known.check.__module__ != check.__module__:
            raise ValueError(f"{code} is already taken by {known.name}")
        name = check.__name__.replace("_", "-")
        _RULES[code] = Rule(code, name, needs, severity, subsumes, check)
        return check

    return register


def load_rules() -> Mapping[str, Rule]:
    """Import every module of ``learnables.auditing.rules``; the rules by code, sorted."""
    package = importlib.import_module("learnables.auditing.rules")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    return dict(sorted(_RULES.items()))


def patterns_in(said: str | Iterable[str], of: str = "select") -> tuple[str, ...]:
    """Codes, beginnings of codes and names: one, several, or several in one text with commas.

    Raises:
        ArgumentError: It is no text.
        LearnablesError: One of them means no rule, so that what it asks for would be nothing.
    """
    items = (
        [said] if isinstance(said, str) else list(said) if isinstance(said, Iterable) else [said]
    )
    for item in items:
        if not isinstance(item, str):
            raise ArgumentError(
                "rules are named by text",
                where=of,
                found=describe(said),
                wanted="codes, beginnings of codes or names",
                mend=f"{of}=['LRN2', 'no-gradient']",
            )
    patterns = tuple(part.strip() for item in items for part in item.split(",") if part.strip())
    for pattern in patterns:
        rules_named(pattern)
    return patterns


def rules_named(pattern: str) -> list[Rule]:
    """The rules that a code, the beginning of one, or a name means.

    Raises:
        LearnablesError: There is none; the message offers the nearest.
    """
    rules = load_rules().values()
    found = [rule for rule in rules if picks(rule, (pattern,))]
    if not found:
        every = [word for rule in rules for word in (rule.code, rule.name)]
        near = difflib.get_close_matches(pattern, every, n=1)
        raise LearnablesError(
            "there is no such rule",
            found=repr(pattern),
            wanted=f"a code, the beginning of one, or a name; is {near[0]} meant?"
            if near
            else "a code, the beginning of one, or a name",
            mend="learnables rules",
        )
    return found


def picks(chosen: Rule, patterns: tuple[str, ...]) -> bool:
    """Whether one of ``patterns`` (codes, prefixes of codes, names) means ``chosen``."""
    return any(
        chosen.name == p.replace("_", "-") or (p.startswith("LRN") and chosen.code.startswith(p))
        for p in patterns
    )
