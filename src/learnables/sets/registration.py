"""Put constraints on parameters that exist, take them off, measure: ``ln.constrain`` and kin."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from learnables._torch import gather
from learnables.arguments import optimizers_in
from learnables.entries import Entry, entries
from learnables.errors import ConstraintError, SelectionError
from learnables.notes import Note, Statement, caller, note_of, notes_of, put_note
from learnables.select import Selector, select
from learnables.sets.apply import enforce_with, enforcers_holding, holders, kept_of, place_
from learnables.sets.base import Set
from learnables.sets.constraint import Constraint, How, admit, call_of, constrained, constraint_of
from learnables.sets.parametrized import OnTheSet, is_parametrized, parametrizations, parametrize_


def constrain(
    model: nn.Module,
    selector: Selector,
    set: Set,
    how: How = "project",
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    view: str | None = None,
    *,
    lazy: float | None = None,
    momentum: bool = False,
) -> tuple[Entry, ...]:
    """Keep parameters in a set: their values are projected now and after every change.

    Args:
        model: The model.
        selector: What to pick: a glob, a pattern, a module class, a Parameter, a function.
        set: Where the value lies, e.g. ``ln.sets.Orthogonal()``.
        how: ``"project"``: after each step of ``optimizer``, all parameters in one batched call;
            they stay the Parameters they are. ``"tangent"``: also takes the part of the gradient
            away that would leave the set, which is more accurate for large steps.
            ``"parametrize"``: on each access, through torch's parametrizations, without an
            optimizer.
        optimizer: The optimizer, or all of them; not for ``"parametrize"``.
        view: Which numbers make up a point: ``"rows"``, ``"cols"``, ``"conv"``, ``"heads:12"``,
            ``"qkv:3"`` or a pattern ``"(h d) i -> h d i, h=12"``. When None, vectors are the last
            dimension and matrices the last two.
        lazy: Enforce only where a cheap estimate of the violation exceeds this.
        momentum: Take the part across the set out of the optimizer's momentum too.

    Returns:
        The entries that are constrained now.

    Raises:
        SelectionError: The selector picks nothing.
        ShapeError: The set or the view does not fit a parameter; nothing is changed then.
        ConstraintError: ``optimizer`` is missing or does not hold a parameter, a parameter has
            another constraint already, only one side of a tie is picked, the dtype is wrong, or a
            value is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
        >>> _ = ln.constrain(model, "*.weight", ln.sets.Orthogonal(), optimizer=optimizer)
        >>> model(torch.randn(2, 8)).sum().backward()
        >>> optimizer.step()
        >>> max(ln.violation(model).values()) < 1e-5
        True

    Cost:
        After each step 2 to 3 products of the matrix with its Gram matrix, batched over parameters
        of one shape; vectors a few passes. See benchmarks/constraints.py.
    """
    constraint = Constraint(set, view, how, lazy, momentum)
    optimizers = optimizers_in(optimizer)
    _bake(model, selector, to=constraint)
    picked = _picked(model, selector)
    for entry in picked:
        _refuse_half_a_tie(entry, selector)
        _refuse_another(entry, constraint)
        admit(entry, constraint)
        if how != "parametrize":
            _require_optimizer(entry, constraint, optimizers)
    for entry in picked:
        place_(entry, constraint)
    at = caller()
    for entry in picked:
        _release(entry)
        _write_down(entry, constraint, at)
        if how == "parametrize":
            parametrize_(entry, constraint)
    for opt in optimizers if how != "parametrize" else ():
        mine = [kept_of(e, constraint) for e in picked if holders(e.param, [opt])]
        if mine:
            enforce_with(opt, mine)
    return entries_like(model, picked)


def unconstrain(model: nn.Module, selector: Selector) -> tuple[Entry, ...]:
    """Let parameters go where they like again; their values stay as they are.

    Args:
        model: The model.
        selector: What to pick.

    Returns:
        The entries that were constrained.

    Raises:
        SelectionError: The selector picks nothing.
        ConstraintError: What it picks is not constrained.

    Example:
        >>> model = nn.Linear(3, 3)
        >>> _ = ln.constrain(model, "weight", ln.sets.Skew(), how="parametrize")
        >>> [entry.name for entry in ln.unconstrain(model, "weight")]
        ['weight']
    """
    _bake(model, selector)
    picked = _picked(model, selector)
    free = [entry for entry in picked if constraint_of(entry) is None]
    if len(free) == len(picked):
        raise ConstraintError(
            "nothing here is constrained",
            where=", ".join(entry.name for entry in free[:5]),
            found="no constraint",
            wanted="a parameter that ln.constrain or ln.parameter(constraint=…) has put in a set",
        )
    at = caller()
    for entry in picked:
        _release(entry)
        _write_down(entry, None, at)
    return tuple(entry for entry in picked if entry not in free)


@torch.no_grad()
def violation(model: nn.Module) -> dict[str, float]:
    """How far each constrained parameter lies outside its set, by its worst point; 0 is inside.

    Returns:
        Qualified name → violation in the unit of its set's ``measure``, e.g. ``‖WᵀW − I‖``; NaN
        where a value is not finite.

    Example:
        >>> model = nn.Linear(3, 3)
        >>> _ = ln.constrain(model, "weight", ln.sets.Skew(), how="parametrize")
        >>> ln.violation(model)
        {'weight': 0.0}

    Cost:
        One pass of each set's own measure; one wait for the device.
    """
    names = {id(e.param): e.name for e in entries(model)}
    worst = {}
    for owner, name, ours in parametrizations(model):
        original = getattr(owner.parametrizations, name).original
        value = getattr(owner, name)
        full = names[id(original)].replace(f"parametrizations.{name}.original", name)
        worst[full] = _worst(ours.constraint, gather(value.detach()))
    for entry, constraint in constrained(model):
        if not is_parametrized(entry):
            worst[entry.name] = _worst(constraint, gather(entry.param.detach()))
    if not worst:
        return {}
    together = torch.stack([value.double().cpu() for value in worst.values()])
    return dict(zip(worst, together.tolist(), strict=True))


def _worst(constraint: Constraint, value: torch.Tensor) -> torch.Tensor:
    found = constraint.violation(value)
    return torch.where(found.isnan().any(), torch.nan, found.nan_to_num(0).amax())


def entries_like(model: nn.Module, picked: Sequence[Entry]) -> tuple[Entry, ...]:
    """The entries of the same Parameters, under the names that they have now."""
    ids = [id(entry.param) for entry in picked]
    return tuple(entry for entry in entries(model) if id(entry.param) in ids)


def _picked(model: nn.Module, selector: Selector) -> tuple[Entry, ...]:
    try:
        return select(entries(model), selector)
    except SelectionError:
        for name, module in model.named_modules():
            for local_name in notes_of(module):
                full = f"{name}.{local_name}" if name else local_name
                source = note_of(module, local_name).get("tied_to")
                if isinstance(selector, str) and selector == full and source:
                    raise ConstraintError(
                        "only one side of a tie is picked",
                        where=full,
                        found=f"{full}, which is {source} transposed",
                        wanted=f"the parameter itself: {source}",
                    ) from None
        raise


def _bake(model: nn.Module, selector: Selector, to: Constraint | None = None) -> None:
    """Make plain Parameters of the parametrized ones that are picked, by either of their names.

    With ``to`` only of those that keep their set and view and change how they are enforced.
    """
    found = {id(entry.param): entry for entry in entries(model)}
    for owner, local_name, ours in parametrizations(model):
        old, inner = ours.constraint, f"parametrizations.{local_name}.original"
        if to is not None and (to.set, to.view) != (old.set, old.view):
            continue
        entry = found[id(getattr(owner.parametrizations, local_name).original)]
        names = tuple(replace(p, name=p.name.replace(inner, local_name)) for p in entry.places)
        if _selects(selector, entry) or _selects(selector, replace(entry, places=names)):
            parametrize.remove_parametrizations(owner, local_name, leave_parametrized=True)


def _selects(selector: Selector, entry: Entry) -> bool:
    try:
        return bool(select([entry], selector))
    except SelectionError:
        return False


def _refuse_half_a_tie(entry: Entry, selector: Selector) -> None:
    missed = [
        place.name
        for place in entry.places
        if not _selects(selector, replace(entry, places=(place,)))
    ]
    if missed:
        raise ConstraintError(
            "only one side of a tie is picked",
            where=", ".join(entry.names),
            found=f"{_show(selector)}, which leaves out {', '.join(missed)}",
            wanted="all names of the shared parameter, or the Parameter itself",
            mend=f"ln.constrain(model, model.get_parameter({entry.name!r}), …)",
        )


def _show(selector: Selector) -> str:
    return repr(selector) if isinstance(selector, (str, list, tuple)) else "a selector"


def _refuse_another(entry: Entry, constraint: Constraint) -> None:
    old = constraint_of(entry)
    if is_parametrized(entry):
        raise ConstraintError(
            "the parameter is parametrized already",
            where=entry.name,
            found=", ".join(type(step).__name__ for step in entry.owner.children()),
            wanted="a plain Parameter",
            mend=f"ln.unconstrain(model, {entry.name!r})"
            if isinstance(next(entry.owner.children()), OnTheSet)
            else "torch.nn.utils.parametrize.remove_parametrizations(module, name)",
        )
    if old is not None and (old.set, old.view) != (constraint.set, constraint.view):
        raise ConstraintError(
            "the parameter is constrained already",
            where=entry.name,
            found=f"{old!r}",
            wanted=f"no constraint before {constraint!r} is put on",
            mend=f"ln.unconstrain(model, {entry.name!r})",
        )


def _require_optimizer(
    entry: Entry, constraint: Constraint, optimizers: Sequence[Optimizer]
) -> None:
    call = f"ln.constrain(model, {entry.name!r}, {call_of(constraint.set)}"
    if not optimizers:
        raise ConstraintError(
            "nothing would keep the parameter in its set",
            where=entry.name,
            found=f"how={constraint.how!r} without an optimizer",
            wanted='optimizer=optimizer, or how="parametrize"',
            mend=f"{call}, optimizer=optimizer)",
        )
    if not holders(entry.param, optimizers):
        raise ConstraintError(
            "the optimizer does not hold the parameter",
            where=entry.name,
            found=f"{entry.looks}; in 0 of {len(optimizers)} optimizers",
            wanted="the optimizer that steps it",
            mend=f"optimizer.add_param_group({{'params': [model.get_parameter({entry.name!r})]}})",
        )


def _release(entry: Entry) -> None:
    for enforcer in enforcers_holding(entry.param):
        enforcer.drop([entry.param])


def _without_constraint(note: Note) -> Iterator[Statement]:
    """What was annotated, less what is said anew; a second statement would be a contradiction."""
    for statement in note.annotated:
        fields = {name: v for name, v in statement.fields.items() if name != "constraint"}
        if fields:
            yield replace(statement, fields=fields)


def _write_down(entry: Entry, constraint: Constraint | None, at: str) -> None:
    for place in entry.places:
        note = replace(place.note, annotated=tuple(_without_constraint(place.note)))
        if constraint is not None or note.get("constraint") is not None:
            said = Statement({"constraint": constraint}, at, "ln.constrain")
            note = replace(note, annotated=(*note.annotated, said))
        put_note(place.owner, place.local_name, note)
