"""LRN403: the gradients that arrive are consumed by a step."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN403", needs=Stage.BACKWARD, subsumes=("LRN401", "LRN402", "LRN405", "LRN410"))
def never_consumed(evidence: Evidence) -> Iterator[Finding]:
    """A parameter whose gradients are all cleared before a step consumes them.

    ## Why it matters

    `zero_grad` between `backward` and `step`, a step before the backward, or a step that is never
    called: gradients arrive, look right, and nothing is learned from them.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.zero_grad()
        optimizer.step()
        return loss
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        loss = model(torch.randn(8, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## When to silence it

    The parameter is updated by hand from its gradient.
    """
    if _is_guarded(evidence):
        return
    for entry in evidence.trainable():
        delivered = evidence.contributions(entry)
        lost = [c for c in delivered if c.discarded_by is not None]
        if len(lost) < 2 or any(c.consumed_by for c in delivered):
            continue
        by_hand = any(set(look.changes) - {"step"} for look in evidence.looks_at(entry))
        if not evidence.groups_of(entry) or by_hand:
            continue
        steps = [e for e in evidence.happened("step") if id(entry.param) in e.ids]
        cleared = lost[0].discarded_by
        yield Finding(
            what="every gradient is cleared before a step consumes it",
            where=list(entry.names),
            found=f"{len(lost)} gradients cleared, 0 consumed, {len(steps)} steps",
            wanted="zero_grad, backward, step, in this order",
            location=cleared.location if cleared is not None else None,
        )


def _is_guarded(evidence: Evidence) -> bool:
    """The loop does without a step because some gradient is not finite: that is the finding."""
    bad = {
        event.iteration
        for event in evidence.happened("backward")
        if any(amount.nonfinite for amount in event.arrived.values())
    }
    return not evidence.happened("step") and len(bad) == evidence.iterations
