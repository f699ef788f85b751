"""LRN206: the optimizer lives as long as the training."""

from collections.abc import Iterator

from torch import Tensor

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN206", needs=Stage.STEP, subsumes=("LRN202", "LRN203", "LRN4"))
def optimizer_rebuilt(evidence: Evidence) -> Iterator[Finding]:
    """An optimizer with state that is built anew in every iteration.

    ## Why it matters

    The moments are forgotten and bias correction starts again: Adam then moves each entry by
    exactly the learning rate, whatever its gradient. A scheduler keeps the optimizer it was given.

    ## Example

    ```python
    model = nn.Linear(4, 1)

    def step():
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## When to silence it

    Starting afresh is the method, e.g. at each task.
    """
    built = {id(e.subject): e for e in evidence.happened("optimizer")}
    steps = evidence.happened("step")
    for entry in evidence.trainable():
        mine = [e for e in steps if id(entry.param) in e.ids]
        fresh = [e for e in mine if id(e.subject) in built and _has_state(e.subject)]
        if len({id(e.subject) for e in fresh}) > 1:
            yield Finding(
                what="the optimizer is built anew inside the loop",
                where=list(entry.names),
                found=f"{len({id(e.subject) for e in mine})} optimizers in {len(mine)} steps",
                wanted="one",
                location=built[id(fresh[0].subject)].location,
            )


def _has_state(optimizer: object) -> bool:
    """It keeps tensors between steps; plain SGD does not."""
    state = getattr(optimizer, "state", {})
    return any(isinstance(value, Tensor) for own in state.values() for value in own.values())
