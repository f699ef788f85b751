"""LRN201: every trainable parameter sits in an optimizer group."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.entries import Entry


@rule("LRN201", needs=Stage.OPTIMIZER, subsumes=("LRN3", "LRN4"))
def missing_from_optimizer(evidence: Evidence) -> Iterator[Finding]:
    """A trainable parameter that no optimizer group holds.

    ## Why it matters

    The gradient is computed and stored at every step, yet the value never moves. The loss
    still falls, because the other parameters learn, so the curve does not show it. It happens
    when a layer is added, replaced, unfrozen, re-parametrized or sharded after the optimizer
    was built, and when a group is filled from an iterator that was used before.

    ## Example

    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    optimizer = torch.optim.AdamW(model.parameters())
    model.append(nn.Linear(4, 1))  # too late: the optimizer has its list
    ```

    ## Use instead

    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.append(nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    ```

    ## When to silence it

    The parameter is stepped by hand, or by a second optimizer that was not handed to `audit`.
    """
    for entry in evidence.trainable():
        if not evidence.groups_of(entry) and not _is_meant(evidence, entry):
            yield Finding(
                what="trainable parameter is in no optimizer group",
                where=list(entry.names),
                found=f"{entry.looks}; in 0 of {len(evidence.groups)} groups",
                wanted="exactly one group",
                mend=_mend(evidence, entry),
            )


def _is_meant(evidence: Evidence, entry: Entry) -> bool:
    """A teacher that is averaged by hand, or somebody else's module in evaluation mode."""
    looks = evidence.looks_at(entry)
    reached = any(look.reached for look in looks)
    if evidence.is_found(entry):
        return not reached or not entry.owner.training
    by_hand = any(set(look.changes) - {"step"} for look in looks)
    return bool(looks) and by_hand and not reached


def _mend(evidence: Evidence, entry: Entry) -> str:
    if not any(entry is e for e in evidence.entries_of_model()):
        return ""
    this = f"model.get_parameter({entry.name!r})"
    if any("param_names" in group.options for group in evidence.groups):
        this = f"({entry.name!r}, {this})"  # torch wants pairs where the groups are named
    return f"optimizer.add_param_group({{'params': [{this}]}})"
