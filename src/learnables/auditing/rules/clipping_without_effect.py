"""LRN409: gradients are clipped between backward and step."""

from collections.abc import Iterator

from learnables.auditing.evidence import Event, Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN409", needs=Stage.STEP, subsumes=("LRN410",))
def clipping_without_effect(evidence: Evidence) -> Iterator[Finding]:
    """Clipping at a moment when no gradient waits for a step.

    ## Why it matters

    Before the backward there is nothing to clip yet, after the step it is too late: the step
    consumes gradients of any size, and the code looks as if they were limited.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss
    ```

    ## When to silence it

    Only the norm that the call returns is wanted.
    """
    calls: dict[str | None, list[Event]] = {}
    effective: set[str | None] = set()
    waiting: set[int] = set()
    delivered = {id(p) for event in evidence.happened("backward") for p in event.arrived}
    for event in evidence.events:
        if event.kind == "backward":
            waiting |= {id(p) for p in event.arrived}
        elif event.kind in ("zero_grad", "step"):
            waiting -= event.ids
        elif event.kind == "clip" and event.ids & delivered:
            calls.setdefault(event.location, []).append(event)
            if event.ids & waiting:
                effective.add(event.location)
    for location, events in calls.items():
        if location in effective or len(events) < 2:
            continue
        clipped = {i for event in events for i in event.ids}
        for entry in evidence.trainable():
            if id(entry.param) in clipped and evidence.ever(entry, "stepped"):
                yield Finding(
                    what="gradients are clipped when none waits for a step",
                    where=list(entry.names),
                    found=f"{len(events)} of {len(events)} calls before the backward or after "
                    "the step",
                    wanted="between backward and step",
                    location=location,
                )
