"""LRN406: micro-batches are averaged, not summed."""

from collections.abc import Iterator

from learnables.auditing.evidence import Event, Evidence, Look, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN406", needs=Stage.STEP, severity="warning")
def accumulation_not_averaged(evidence: Evidence) -> Iterator[Finding]:
    """Several mean losses of one backward call, summed into one step without dividing.

    ## Why it matters

    The gradient is as many times too large as there are micro-batches: that many times the
    learning rate. Adam hides it, and the schedule is blamed.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        for x in torch.randn(4, 8, 4):
            loss = model(x).square().mean()
            loss.backward()
        optimizer.step()
        return loss
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        for x in torch.randn(4, 8, 4):
            loss = model(x).square().mean() / 4
            loss.backward()
        optimizer.step()
        return loss
    ```

    ## When to silence it

    The losses belong to different tasks or views and are meant to be summed.
    """
    for entry in evidence.trainable():
        for i, look in enumerate(evidence.looks_at(entry)):
            consumed = [
                c.backward
                for c in evidence.contributions(entry)
                if c.backward.iteration == i and len(c.consumed_by) == 1
            ]
            if not look.stepped or not _is_summed(consumed):
                continue
            if not _same(look, evidence, i):
                continue  # somebody divides the gradients before the step
            yield Finding(
                what="mean losses of several micro-batches are summed",
                where=list(entry.names),
                found=f"{len(consumed)} backwards of undivided mean losses in one step",
                wanted=f"each loss divided by {len(consumed)}",
                location=consumed[0].location,
            )
            break


def _is_summed(backwards: list[Event]) -> bool:
    return (
        len(backwards) > 1
        and len({event.location for event in backwards}) == 1
        and len({event.ids for event in backwards}) == 1
        and all(event.details["reduction"] == "mean" for event in backwards)
        and not any(event.details["inside_step"] for event in backwards)
    )


def _same(look: Look, evidence: Evidence, iteration: int) -> bool:
    """Whether the step consumed what the backwards left, apart from clipping and unscaling."""
    if any(e.iteration == iteration for e in evidence.happened("clip", "unscale", "scaler_step")):
        return True
    if look.accumulated is None or look.gradient is None:
        return True
    return abs(look.accumulated.norm - look.gradient.norm) <= 1e-3 * look.accumulated.norm
