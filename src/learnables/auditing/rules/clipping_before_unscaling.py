"""LRN408: gradients are unscaled before they are clipped."""

from collections.abc import Iterator

from learnables.auditing.evidence import Event, Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN408", needs=Stage.BACKWARD, subsumes=("LRN401",))
def clipping_before_unscaling(evidence: Evidence) -> Iterator[Finding]:
    """Gradients that are clipped while a `GradScaler` has them multiplied.

    ## Why it matters

    The limit is compared with gradients that are 65536 times too large. Nearly every step is
    clipped, and after unscaling it is 65536 times too small.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        scaler.scale(loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss
    ```

    ## When to silence it

    The limit was multiplied by the scale too.
    """
    scaled: dict[int, Event] = {}
    found: dict[int, tuple[Event, float]] = {}
    factor = 1.0
    for event in evidence.events:
        if event.kind == "scale":
            factor = event.details["factor"]
        elif event.kind == "backward" and event.details["scaled"]:
            scaled.update({id(p): event for p in event.arrived})
        elif event.kind in ("unscale", "zero_grad", "scaler_step"):
            for p in event.params:
                scaled.pop(id(p), None)
        elif event.kind == "clip" and factor != 1.0:
            for p in event.params:
                if id(p) in scaled:
                    found.setdefault(id(p), (event, factor))
    for entry in evidence.entries:
        if id(entry.param) in found:
            event, factor = found[id(entry.param)]
            yield Finding(
                what="gradients are clipped before they are unscaled",
                where=list(entry.names),
                found=f"a limit of {event.details.get('max_norm', event.details.get('max_value'))}"
                f" on gradients multiplied by {factor:g}",
                wanted="scaler.unscale_(optimizer) before the clipping",
                location=event.location,
            )
