"""Enforce constraints around an optimizer's step: what `ln.constrain` and `ln.attach` install."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import distribute_like, gather, is_dtensor
from learnables.arguments import optimizers_in
from learnables.entries import Entry
from learnables.errors import ConstraintError, warn
from learnables.sets.base import ABOVE_TOLERANCE, KEPT_DEGENERATE, KEPT_NONFINITE
from learnables.sets.batch import Group, Kept, Later, grouped
from learnables.sets.constraint import Constraint, admit, constrained
from learnables.sets.parametrized import is_parametrized, parametrize_

_enforcers: "WeakKeyDictionary[Optimizer, Enforcer]" = WeakKeyDictionary()


@final
@dataclass(frozen=True)
class Status:
    """What the last enforcement said about one parameter; points are counted in its view.

    Attributes:
        name: Its qualified name.
        nonfinite: Points with NaN or infinity, left as they were.
        degenerate: Points without a unique nearest point, left as they were.
        above: Points that one call could not bring all the way.
        enforced: How often the parameter's group was enforced.
        skipped: How often the estimate of a lazy constraint made that unnecessary.
    """

    name: str
    nonfinite: tuple[int, ...]
    degenerate: tuple[int, ...]
    above: tuple[int, ...]
    enforced: int
    skipped: int


@final
class Enforcer:
    """Keeps a list of parameters in their sets: a pure function of their values, so idempotent.

    Args:
        kept: The parameters, with their constraints.

    Example:
        >>> w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> enforcer = Enforcer([Kept("w", w, Constraint(ln.sets.Ball()))])
        >>> enforcer.project_()
        >>> w.data
        tensor([[0.6000, 0.8000]])
    """

    def __init__(self, kept: Iterable[Kept] = ()) -> None:
        self._kept: list[Kept] = []
        self._groups: list[Group] = []
        self._named: set[str] = set()
        self._news: list[Later] = []
        self._hooks: list[Any] = []
        self.add(kept)

    @property
    def kept(self) -> tuple[Kept, ...]:
        """The parameters, in the order they were added."""
        return tuple(self._kept)

    @property
    def attached(self) -> frozenset[int]:
        """The ids of the parameters that it takes care of."""
        return frozenset(id(one.parameter) for one in self._kept)

    def add(self, kept: Iterable[Kept]) -> None:
        """Take more parameters; one that is here already gets the new constraint."""
        new = {id(one.parameter): one for one in kept}
        self._kept = [one for one in self._kept if id(one.parameter) not in new] + [*new.values()]
        self._regroup()

    def drop(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leave some parameters alone from now on."""
        gone = {id(p) for p in parameters}
        self._kept = [one for one in self._kept if id(one.parameter) not in gone]
        self._regroup()

    def _regroup(self) -> None:
        self._groups = grouped(self._kept)
        self._news = [Later() for _ in self._groups]

    @torch.no_grad()
    def project_(self) -> None:
        """Bring every parameter back into its set; to be called after the optimizer's step.

        Never waits for an accelerator. A point that cannot be projected stays as it is; it is named
        in one warning, at the latest at the next call, and in `status`.
        """
        self._refresh()
        for group, news in zip(self._groups, self._news, strict=True):
            group.project_()
            if group.status is None or group.status.numel() == 0:
                continue
            if group.status.device.type != "cpu":
                self._tell(group, news)  # what the call before this one said
            news.post(group.status.amax())
            if group.status.device.type == "cpu":
                self._tell(group, news)

    @torch.no_grad()
    def before_step_(self) -> None:
        """Take the part across the set out of the gradients, where a constraint says "tangent"."""
        self._refresh()
        for group in self._groups:
            if group.constraint.how == "tangent":
                group.before_step_()

    def status(self) -> list[Status]:
        """What the last call said about each parameter; waits for the device."""
        found = []
        for group in self._groups:
            for one, codes in zip(group.members, group.statuses(), strict=True):
                found.append(
                    Status(
                        one.name,
                        nonfinite=_where(codes, KEPT_NONFINITE),
                        degenerate=_where(codes, KEPT_DEGENERATE),
                        above=_where(codes, ABOVE_TOLERANCE),
                        enforced=group.calls,
                        skipped=group.skipped,
                    )
                )
        return found

    def hook(self, optimizer: Optimizer) -> None:
        """Run around every step of ``optimizer`` from now on."""

        def before(*_: object) -> None:
            self.before_step_()

        def after(stepped: Optimizer, *_: object) -> None:
            self.project_()
            for group in self._groups:
                if group.constraint.momentum:
                    with torch.no_grad():
                        group.momentum_(stepped)

        self._hooks += [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]
        _enforcers[optimizer] = self

    def remove(self) -> None:
        """Take the hooks away again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for optimizer in [o for o, enforcer in _enforcers.items() if enforcer is self]:
            del _enforcers[optimizer]

    def _refresh(self) -> None:
        """Follow parameters that were replaced: by ``to_empty``, a loading, a tie."""
        if sum(one.refresh() for one in self._kept):
            self.add(self._kept)

    def _tell(self, group: Group, news: Later) -> None:
        worst = news.read(wait=False)
        if worst is None or int(worst) == 0:
            return
        for one, codes in zip(group.members, group.statuses(), strict=True):
            bad = [i for i, code in enumerate(codes) if code in (KEPT_NONFINITE, KEPT_DEGENERATE)]
            if bad and one.name not in self._named:
                self._named.add(one.name)
                nonfinite = any(codes[i] == KEPT_NONFINITE for i in bad)
                some = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
                warn(
                    "a parameter could not be projected and was left as it is",
                    where=one.name,
                    found=("NaN or infinity" if nonfinite else "no unique nearest point")
                    + f" in {len(bad)} of {len(codes)} points: {some}",
                    wanted=f"points near {one.constraint.set!r}",
                )


def _where(codes: list[int], wanted: int) -> tuple[int, ...]:
    return tuple(i for i, code in enumerate(codes) if code == wanted)


def enforcer_of(optimizer: Optimizer) -> Enforcer | None:
    """What runs around the steps of ``optimizer``, if anything."""
    return _enforcers.get(optimizer)


@final
class Enforcement:
    """What one `enforce` added to the enforcers of some optimizers."""

    def __init__(self, added: list[tuple[Enforcer, list[Kept]]]) -> None:
        self._added = added

    @property
    def attached(self) -> frozenset[int]:
        """The ids of the parameters that it takes care of."""
        return frozenset(id(one.parameter) for _, kept in self._added for one in kept)

    def remove(self) -> None:
        """Leave them alone from now on."""
        for enforcer, kept in self._added:
            enforcer.drop(one.parameter for one in kept)
        self._added = []


def enforce(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer]) -> Enforcement:
    """Enforce, from now on, every constraint that ``model`` declares; what `ln.attach` calls.

    Values are projected now. Parameters that are enforced already are not enforced twice.

    Args:
        model: The model.
        optimizer: The optimizer, or all of them.

    Returns:
        A handle; ``handle.remove()`` ends what this call began.

    Raises:
        ConstraintError: A trainable constrained parameter is in none of the optimizers, or its
            constraint does not fit it.
    """
    optimizers = optimizers_in(optimizer)
    declared = list(constrained(model))
    wanted = [(e, c) for e, c in declared if c.how != "parametrize"]
    missing = [e for e, _ in wanted if e.trainable and not holders(e.param, optimizers)]
    if missing:
        raise ConstraintError(
            "a constrained parameter is in none of the optimizers",
            where=", ".join(e.name for e in missing),
            found=f"{missing[0].looks}; in 0 of {len(optimizers)} optimizers",
            wanted="an optimizer that holds it",
            mend="optimizer.add_param_group({'params': "
            f"[model.get_parameter({missing[0].name!r})]}})",
        )
    for entry, constraint in declared:
        admit(entry, constraint)
    for entry, constraint in declared:
        place_(entry, constraint)
        if constraint.how == "parametrize" and not is_parametrized(entry):
            parametrize_(entry, constraint)
    added = []
    for opt in optimizers:
        there = _enforcers[opt].attached if opt in _enforcers else frozenset()
        mine = [kept_of(e, c) for e, c in wanted if holders(e.param, [opt])]
        mine = [one for one in mine if id(one.parameter) not in there]
        if mine:
            added.append((enforce_with(opt, mine), mine))
    return Enforcement(added)


def enforce_with(optimizer: Optimizer, kept: Iterable[Kept]) -> Enforcer:
    """Add parameters to the enforcer of ``optimizer``, which is made where there is none."""
    enforcer = _enforcers.get(optimizer)
    if enforcer is None:
        enforcer = Enforcer()
        enforcer.hook(optimizer)
    enforcer.add(kept)
    return enforcer


def enforcers_holding(param: nn.Parameter) -> list[Enforcer]:
    """The enforcers that take care of ``param``."""
    return [enforcer for enforcer in _enforcers.values() if id(param) in enforcer.attached]


def holders(param: nn.Parameter, optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizers that hold ``param``."""
    return [
        opt
        for opt in optimizers
        if any(p is param for group in opt.param_groups for p in group["params"])
    ]


def kept_of(entry: Entry, constraint: Constraint) -> Kept:
    """An entry as the enforcer keeps it."""
    return Kept(entry.name, entry.param, constraint, entry.owner, entry.local_name)


@torch.no_grad()
def place_(entry: Entry, constraint: Constraint) -> None:
    """Project the value now; what lies inside already is left bit by bit.

    Raises:
        ConstraintError: The value is not finite.
    """
    param = entry.param
    if param.device.type == "meta" or param.numel() == 0:
        return
    value = gather(param)
    bad = int((~value.isfinite()).sum())
    if bad:
        raise ConstraintError(
            "a value that is not finite has no nearest point in any set",
            where=entry.name,
            found=f"{bad} of {value.numel()} entries are NaN or infinite",
            wanted="finite values",
            mend=f"nn.init.normal_(model.get_parameter({entry.name!r}), std=0.02)",
        )
    inside = constraint.contains(value)
    if bool(inside.all()):
        return
    points = constraint.points(value)
    unclear = int(constraint.set.degenerate(points).sum())
    if unclear:
        warn(
            "a value has many nearest points; one of them is taken",
            where=entry.name,
            found=f"{unclear} of {inside.numel()} points are zero or of deficient rank",
            wanted=f"points near {constraint.set!r}",
            mend=f"nn.init.normal_(model.get_parameter({entry.name!r})), before",
        )
    moved: Tensor = constraint.project(value)
    param.copy_(distribute_like(moved, param) if is_dtensor(param) else moved)


@torch.no_grad()
def project_(model: nn.Module) -> None:
    """Bring every constrained parameter of ``model`` into its set: an averaged copy, say.

    The average of two orthogonal matrices is not orthogonal; the copies that
    ``torch.optim.swa_utils.AveragedModel`` keeps know their constraints, because a copy of a model
    copies its notes.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> _ = ln.constrain(model, "weight", ln.sets.Orthogonal(), optimizer=optimizer)
        >>> average = torch.optim.swa_utils.AveragedModel(model)
        >>> average.module.weight.data *= 0.9
        >>> ln.sets.project_(average)
        >>> ln.violation(average)["module.weight"] < 1e-5
        True
    """
    Enforcer(kept_of(e, c) for e, c in constrained(model)).project_()
