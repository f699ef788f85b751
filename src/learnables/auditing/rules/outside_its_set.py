"""LRN705: a constrained value lies in its set when the iteration is over."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.intent import declared_constraint
from learnables.auditing.rule import Finding, needed, rule
from learnables.entries import Entry


@rule("LRN705", needs=Stage.MODEL)
def outside_its_set(evidence: Evidence) -> Iterator[Finding]:
    """A parameter with a declared constraint whose value is outside the set.

    ## Why it matters

    A projection between backward and step, or at the start of the next forward only, leaves the
    value outside whenever it is read, saved or evaluated. A constraint that was declared and never
    attached is never enforced at all.

    ## Example

    ```python
    model = nn.Linear(4, 4)
    model.w = ln.parameter(4, 4, init=ln.init.normal(1.0), constraint=ln.sets.Sphere())
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)
    model.w = ln.parameter(4, 4, init=ln.init.normal(1.0), constraint=ln.sets.Sphere())
    optimizer = torch.optim.SGD(ln.param_groups(model, lr=0.1))
    ln.attach(model, optimizer)
    step = None
    ```

    ## When to silence it

    The set is approached slowly, by a penalty.
    """
    what = "a declared constraint, or intent=ln.Intent(constraints={…})"
    constrained = needed(list(constraints(evidence)), what)
    for entry, chosen in constrained:
        value = evidence.last.get(entry.param, evidence.first.get(entry.param))
        if value is None:
            continue
        distance = violation(chosen, value)
        if distance > tolerance(value):
            yield Finding(
                what="a parameter is outside the set that it is meant to stay in",
                where=list(entry.names),
                found=f"violation {distance:.1e} of {chosen!r}"
                + (f" after {evidence.n_of_n}" if evidence.iterations else ""),
                wanted=f"≤ {tolerance(value):.0e}",
            )


def constraints(evidence: Evidence) -> Iterator[tuple[Entry, Any]]:
    """Entries and the sets they are meant to stay in: by intent, else by declaration."""
    for entry in evidence.entries:
        meant = [
            chosen
            for name, chosen in evidence.intent.constraints.items()
            if entry in evidence.entries_named(name)
        ]
        declared = [c for p in entry.places if (c := declared_constraint(p.note)) is not None]
        for chosen in (meant or declared)[:1]:
            yield entry, chosen


def violation(chosen: Any, value: Tensor) -> float:
    """The largest distance from the set, over all points of ``value``."""
    with torch.no_grad():
        distance = torch.as_tensor(chosen.violation(value))
        return float(distance.abs().max())


def tolerance(value: Tensor) -> float:
    """What rounding in the storage dtype leaves of a projection."""
    width = value.shape[-1] if value.ndim else 1
    return float(64 * torch.finfo(value.dtype).eps * max(1, width) ** 0.5)
