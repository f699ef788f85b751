"""LRN726: an averaged copy is projected as well."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.intent import means
from learnables.auditing.rule import Finding, needed, rule
from learnables.auditing.rules.copy_is_an_alias import tensors_of
from learnables.sets.constraint import constraint_of


@rule("LRN726", needs=Stage.MODEL, severity="warning")
def copy_outside_its_set(evidence: Evidence) -> Iterator[Finding]:
    """An average of a constrained parameter that lies outside the set.

    ## Why it matters

    The average of two orthogonal matrices is not orthogonal, and the average of two unit vectors is
    shorter than 1. An EMA that is evaluated or exported is therefore another kind of model than the
    one that was trained.

    ## Example

    ```python
    model = nn.Linear(4, 4)
    ln.constrain(model, "weight", ln.sets.Orthogonal(), how="parametrize")
    ln.sets.bake(model)
    copies = {"ema": {k: 0.9 * v.detach() for k, v in model.state_dict().items()}}
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)
    ln.constrain(model, "weight", ln.sets.Orthogonal(), how="parametrize")
    ln.sets.bake(model)
    copies = {"ema": {k: 1.0 * v.detach() for k, v in model.state_dict().items()}}
    ```

    ## When to silence it

    The copy is averaged further and projected before it is used: `ln.sets.project_(average)`.
    """
    needed(evidence.copies, "copies={name: state dict or module}")
    for entry in evidence.entries:
        constraint = constraint_of(entry)
        if constraint is None:
            continue
        for name, copied in evidence.copies.items():
            for key, value in tensors_of(copied).items():
                known = any(means(key, n) or means(n, key) for n in entry.plain_names)
                if not known or value.shape != entry.shape or value.device.type == "meta":
                    continue
                distance = float(constraint.violation(value.detach()).max())
                allowed = constraint.tolerance(value.shape, value.dtype)
                if distance > 2 * allowed:
                    yield Finding(
                        what="a copy of a constrained parameter lies outside the set",
                        where=list(entry.names),
                        found=f"{name}[{key!r}]: {constraint.set.measure} = {distance:.1e}",
                        wanted=f"≤ {allowed:.0e}; ln.sets.project_ brings a module back",
                    )
