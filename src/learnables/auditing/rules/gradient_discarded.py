"""LRN405: no micro-batch is cleared away before its step."""

from collections.abc import Iterator, Sequence

from learnables.auditing.evidence import Contribution, Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN405", needs=Stage.STEP)
def gradient_discarded(evidence: Evidence) -> Iterator[Finding]:
    """Gradients of some micro-batches that are cleared before the step that should consume them.

    ## Why it matters

    With `zero_grad` inside the accumulation loop only the last micro-batch survives: the effective
    batch is a fraction of what the configuration says, and the work for the others is wasted.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        for x in torch.randn(4, 8, 4):
            optimizer.zero_grad()
            loss = model(x).square().mean() / 4
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

    The discarded backwards serve another purpose, e.g. an attack on the inputs.
    """
    for entry in evidence.trainable():
        lost, kept = _of_one_line(evidence.contributions(entry))
        if lost and kept:
            yield Finding(
                what="gradients are cleared before the step that should consume them",
                where=list(entry.names),
                found=f"{lost} of {lost + kept} gradients of the same backward call discarded",
                wanted="all of them consumed",
                location=_cleared_at(evidence.contributions(entry)),
            )


def _of_one_line(contributions: Sequence[Contribution]) -> tuple[int, int]:
    """(discarded, consumed) within iterations where one line of backward has both."""
    tally: dict[tuple[int, str | None], list[int]] = {}
    for c in contributions:
        count = tally.setdefault((c.backward.iteration, c.backward.location), [0, 0])
        if c.discarded_by is not None and c.discarded_by.iteration == c.backward.iteration:
            count[0] += 1
        elif c.consumed_by:
            count[1] += 1
    both = [count for count in tally.values() if all(count)]
    return sum(lost for lost, _ in both), sum(kept for _, kept in both)


def _cleared_at(contributions: Sequence[Contribution]) -> str | None:
    return next(
        (c.discarded_by.location for c in contributions if c.discarded_by is not None), None
    )
