"""LRN415: backward is called once on each loss."""

from collections.abc import Iterator

from learnables.auditing.evidence import Event, Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN415", needs=Stage.STEP)
def backward_twice(evidence: Evidence) -> Iterator[Finding]:
    """Backward called twice on the same loss for one step.

    ## Why it matters

    The gradient is counted twice: twice the learning rate, hidden by Adam. It is left over from
    debugging with `retain_graph=True`.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward(retain_graph=True)
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

    The first gradient is only looked at, and cleared parameter by parameter.
    """
    for entry in evidence.trainable():
        seen: dict[tuple[object, ...], Event] = {}
        for c in evidence.contributions(entry):
            if not c.consumed_by:
                continue
            key = (c.consumed_by[0].index, c.backward.details["root_ids"], c.backward.iteration)
            first = seen.setdefault(key, c.backward)
            if first is not c.backward and not c.backward.details["inside_step"]:
                yield Finding(
                    what="backward is called twice on one loss",
                    where=list(entry.names),
                    found=f"at {first.location} and {c.backward.location}, for one step",
                    wanted="once",
                    location=c.backward.location,
                )
                break
