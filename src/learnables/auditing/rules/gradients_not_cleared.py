"""LRN404: each gradient is consumed by one step."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN404", needs=Stage.STEP)
def gradients_not_cleared(evidence: Evidence) -> Iterator[Finding]:
    """A gradient that several optimizer steps consume, because nothing clears it in between.

    ## Why it matters

    Each step then applies the running sum of all gradients so far: the loss may still fall, with a
    momentum nobody chose, and diverges later.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        loss = model(torch.randn(8, 4)).square().mean()
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
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## When to silence it

    The running sum is the method.
    """
    for entry in evidence.trainable():
        again = [c for c in evidence.contributions(entry) if len(c.consumed_by) > 1]
        if again:
            yield Finding(
                what="one gradient is consumed by several steps",
                where=list(entry.names),
                found=f"the gradient of iteration {again[0].backward.iteration + 1} by "
                f"{len(again[0].consumed_by)} steps",
                wanted="by one; optimizer.zero_grad() before the next backward",
                location=again[0].consumed_by[1].location,
            )
