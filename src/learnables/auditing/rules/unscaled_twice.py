"""LRN416: what a scaler divides was multiplied before."""

from collections.abc import Iterator

from learnables.auditing.evidence import Event, Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN416", needs=Stage.BACKWARD, subsumes=("LRN401",))
def unscaled_twice(evidence: Evidence) -> Iterator[Finding]:
    """Gradients that a `GradScaler` divides although backward was called on the plain loss.

    ## Why it matters

    The gradients become 65536 times too small: SGD stands still, Adam works with its `eps`.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        scaler.scale(loss)
        loss.backward()
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
        scaler.step(optimizer)
        scaler.update()
        return loss
    ```

    ## When to silence it

    The loss is multiplied by the scale by hand.
    """
    by_location: dict[int, Event] = {}
    plain: dict[int, Event] = {}
    scale = {e.index: e.details["factor"] for e in evidence.happened("scale", "scaler_step")}
    for event in evidence.events:
        if event.kind == "backward":
            for p in event.arrived:
                if event.details["scaled"] or event.details["reduction"] == "scaled":
                    plain.pop(id(p), None)
                else:
                    plain[id(p)] = event
        elif event.kind == "unscale" and any(factor != 1.0 for factor in scale.values()):
            for p in event.params:
                if id(p) in plain:
                    by_location.setdefault(id(p), plain[id(p)])
        elif event.kind in ("zero_grad", "step"):
            for p in event.params:
                plain.pop(id(p), None)
    for entry in evidence.entries:
        if id(entry.param) in by_location:
            yield Finding(
                what="a scaler divides gradients that were never multiplied",
                where=list(entry.names),
                found="backward on the plain loss, then scaler.unscale_ or scaler.step",
                wanted="scaler.scale(loss).backward()",
                location=by_location[id(entry.param)].location,
            )
