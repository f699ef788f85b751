"""LRN411: a step consumes gradients without the loss scale."""

from collections.abc import Iterator

from learnables.auditing.evidence import Event, Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN411", needs=Stage.STEP, subsumes=("LRN303", "LRN40", "LRN605"))
def scale_not_removed(evidence: Evidence) -> Iterator[Finding]:
    """An optimizer that is stepped directly with gradients that a `GradScaler` multiplied.

    ## Why it matters

    The update is 65536 times too large for SGD; Adam hides the factor until its `eps` matters, and
    an overflow is no longer skipped.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        scaler.scale(loss).backward()
        optimizer.step()
        return loss
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss
    ```

    ## When to silence it

    The learning rate was divided by the scale.
    """
    scaled: dict[int, float] = {}
    found: dict[int, tuple[Event, float]] = {}
    factor = 1.0
    for event in evidence.events:
        if event.kind == "scale":
            factor = event.details["factor"]
        elif event.kind == "backward" and event.details["scaled"]:
            scaled.update({id(p): factor for p in event.arrived})
        elif event.kind in ("unscale", "zero_grad"):
            for p in event.params:
                scaled.pop(id(p), None)
        elif event.kind == "step" and not event.details["by_scaler"]:
            for p in event.params:
                if scaled.get(id(p), 1.0) != 1.0:
                    found.setdefault(id(p), (event, scaled[id(p)]))
    for entry in evidence.entries:
        if id(entry.param) in found:
            event, factor = found[id(entry.param)]
            yield Finding(
                what="a step consumes gradients that are still multiplied by the loss scale",
                where=list(entry.names),
                found=f"gradients times {factor:g} in optimizer.step()",
                wanted="scaler.step(optimizer)",
                location=event.location,
            )
