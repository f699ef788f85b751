"""LRN209: the scheduler schedules the optimizer that steps."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN209", needs=Stage.STEP, severity="warning")
def scheduler_of_another(evidence: Evidence) -> Iterator[Finding]:
    """A learning-rate scheduler whose optimizer never steps.

    ## Why it matters

    It keeps the optimizer it was built with. Where that was replaced later, its rates change and
    those of the optimizer in use do not.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(old, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss
    ```

    ## When to silence it

    Its optimizer steps less often than was observed.
    """
    steps = evidence.happened("step")
    stepping = {id(group) for event in steps for group in event.subject.param_groups}
    params = {i for event in steps for i in event.ids}
    for scheduler in {id(e.subject): e.subject for e in evidence.happened("schedule")}.values():
        groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
        held = {id(p) for group in groups for p in group["params"]}
        if not groups or any(id(group) in stepping for group in groups) or not held & params:
            continue
        event = next(e for e in evidence.happened("schedule") if e.subject is scheduler)
        yield Finding(
            what="the scheduler belongs to an optimizer that never steps",
            where=[n for e in evidence.trainable() if id(e.param) in held for n in e.names],
            found=f"{type(scheduler).__name__} over a {type(scheduler.optimizer).__name__} with "
            f"0 of {len(steps)} observed steps",
            wanted="the optimizer that steps these parameters",
            location=event.location,
        )
