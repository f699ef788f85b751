"""From what was said about each parameter to one plan per parameter, with the line that decided."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from learnables._torch import is_uninitialised
from learnables.declare import check_fields
from learnables.entries import Entry, entries
from learnables.errors import PolicyError, ShapeError
from learnables.notes import Statement, caller
from learnables.policy.kinds import Kind, kind_of
from learnables.select import Selector, select

Policy: TypeAlias = Mapping[str, Mapping[str, Any]] | Iterable["tuple[Selector, Mapping[str, Any]]"]

_DEFAULTS = {
    "lr_scale": 1.0,
    "storage_dtype": None,
    "compute_dtype": None,
    "rounding": None,
    "memory_format": None,
    "constraint": None,
    "resize": None,
    "init": None,
    "role": None,
    "tags": (),
}


@dataclass(frozen=True)
class Decision:
    """One field of a plan and where it comes from.

    Attributes:
        field: Name of the policy field.
        value: What was decided.
        by: ``policy=``, ``ln.annotate``, ``ln.parameter``, ``default of its kind`` or ``default``.
        at: ``file:line``, or the reference that a default follows.
    """

    field: str
    value: Any
    by: str
    at: str

    def __str__(self) -> str:
        return f"{self.field}={self.value!r} by {self.by}" + (f" ({self.at})" if self.at else "")


@dataclass(frozen=True)
class Plan:
    """How one parameter is trained, and why.

    Attributes:
        entry: The parameter.
        kind: What kind of parameter it is taken for.
        decisions: Field → decision.
    """

    entry: Entry
    kind: Kind
    decisions: Mapping[str, Decision]

    def __getitem__(self, field: str) -> Any:
        return self.decisions[field].value

    @property
    def name(self) -> str:
        """First qualified name."""
        return self.entry.name

    @property
    def weight_decay(self) -> "bool | float | str":
        """True, False, a coefficient, or ``"init"``."""
        value: bool | float | str = self["weight_decay"]
        return value

    @property
    def lr_scale(self) -> float:
        """What the learning rate is multiplied by."""
        return float(self["lr_scale"])

    @property
    def constraint(self) -> Any:
        """The set it is kept in, or None."""
        return self["constraint"]

    @property
    def why(self) -> list[str]:
        """One line per field: what was decided, by which call, on which line."""
        return [str(d) for d in self.decisions.values() if d.by != "default"]


def resolve(model: nn.Module, policy: Policy | None = None) -> tuple[Plan, ...]:
    """One plan per distinct parameter of ``model``, in the order of the walk.

    For each field the strongest level that says something counts: ``policy=``, then `ln.annotate`,
    then `ln.parameter`, then the default of the parameter's kind.

    Raises:
        PolicyError: Two statements of one level disagree; both lines are named.
        ShapeError: A lazy parameter has no shape yet.
        SelectionError: A selector of ``policy`` picks nothing.
    """
    found = entries(model)
    for entry in found:
        if is_uninitialised(entry.param):
            raise ShapeError(
                "a lazy parameter has no shape yet, by which to tell its kind",
                where=entry.name,
                found=entry.looks,
                wanted="a model that has seen one batch",
                mend="model(batch), once, before",
            )
    given = _given(found, policy)
    return tuple(_plan(entry, given.get(entry.index, [])) for entry in found)


def _given(found: tuple[Entry, ...], policy: Policy | None) -> dict[int, list[Statement]]:
    out: dict[int, list[Statement]] = {}
    if not (policy is None or isinstance(policy, Iterable)):
        raise _unpaired(f"policy={policy!r}")
    pairs = list(policy.items() if isinstance(policy, Mapping) else policy or ())
    at = caller()
    for pair in pairs:
        if not (
            isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[1], Mapping)
        ):
            raise _unpaired(f"{pair!r} in policy=")
    for selector, fields in pairs:
        statement = Statement(check_fields(dict(fields)), f"{selector!r} at {at}", "policy=")
        for entry in select(found, selector):
            out.setdefault(entry.index, []).append(statement)
    return out


def _unpaired(found: str) -> PolicyError:
    return PolicyError(
        "a policy pairs selectors with fields",
        found=found,
        wanted="{selector: {field: value}}, or a list of such pairs",
        mend="policy={'*.gamma': {'weight_decay': False}}",
    )


def _plan(entry: Entry, given: list[Statement]) -> Plan:
    kind = kind_of(entry)
    notes = [place.note for place in entry.places]
    levels = (
        given,
        [statement for note in notes for statement in note.annotated],
        [note.declared for note in notes if note.declared is not None],
    )
    decisions = {}
    for name in ("weight_decay", *_DEFAULTS):
        said = next((d for level in levels if (d := _agree(entry, name, level))), None)
        if said is None and name == "weight_decay":
            bound = next((d for level in levels if (d := _agree(entry, "constraint", level))), None)
            if bound is not None and getattr(bound.value, "fixes_size", False):
                size = f"default of its set: {bound.value!r}"
                said = Decision(name, False, size, "which fixes its size")
        if said is None and name == "weight_decay":
            said = Decision(name, kind.decays, f"default of its kind: {kind.name}", kind.follows)
        decisions[name] = said or Decision(name, _DEFAULTS.get(name), "default", "")
    return Plan(entry, kind, decisions)


def _agree(entry: Entry, name: str, level: list[Statement]) -> Decision | None:
    """What the statements of one level say about one field; None where they say nothing.

    Raises:
        PolicyError: They disagree.
    """
    said = [s for s in level if name in s.fields]
    if not said:
        return None
    first = said[0]
    if name == "tags":
        tags = tuple(dict.fromkeys(tag for s in said for tag in s.fields["tags"]))
        return Decision(name, tags, first.by, first.at)
    for other in said[1:]:
        if other.fields[name] != first.fields[name]:
            raise PolicyError(
                f"two statements about {name} disagree",
                where=", ".join(entry.names),
                found=f"{first.fields[name]!r} by {first.by} ({first.at}); "
                f"{other.fields[name]!r} by {other.by} ({other.at})",
                wanted="one value",
                mend="make the two lines agree, or overrule both with policy= in ln.param_groups",
            )
    return Decision(name, first.fields[name], first.by, first.at)
