"""LRN104: a Parameter stays the same object while it trains."""

from collections.abc import Iterator

from learnables.auditing.evidence import Event, Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.entries import Entry


@rule("LRN104", needs=Stage.BACKWARD, subsumes=("LRN2", "LRN3", "LRN40", "LRN7"))
def replaced_while_training(evidence: Evidence) -> Iterator[Finding]:
    """A name that is given a new Parameter while the loop runs.

    ## Why it matters

    The optimizer, its moments, and DDP hold the object they saw first. A new one, made in `forward`
    or by a projection after the step, never trains; what was learned goes with the old one.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 4))

        def forward(self, x):
            self.weight = nn.Parameter(F.normalize(self.weight, dim=1))
            return F.linear(x, self.weight)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 4))

        def forward(self, x):
            return F.linear(x, F.normalize(self.weight, dim=1))

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## When to silence it

    The model grows on purpose, and the optimizer is rebuilt each time.
    """
    for entry in evidence.trainable():
        events = [e for e in evidence.happened("register") if _is_about(e, entry)]
        if events:
            after_step = _steps_before(evidence, events[0])
            yield Finding(
                what="a Parameter is replaced by a new one while training",
                where=list(entry.names),
                found=f"{len(events)} new objects in {evidence.iterations} observed iterations, "
                f"the first {'after the step' if after_step else 'before the step'}",
                wanted="the value changed in place: parameter.data.copy_(value)",
                location=events[0].location,
            )


def _is_about(event: Event, entry: Entry) -> bool:
    if event.details["old"] is None:
        return False
    return any(
        event.subject is place.owner and event.details["name"] == place.local_name
        for place in entry.places
    )


def _steps_before(evidence: Evidence, event: Event) -> bool:
    return any(
        e.iteration == event.iteration and e.index < event.index for e in evidence.happened("step")
    )
