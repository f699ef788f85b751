"""LRN402: the learning rate is not 0 for ever."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN402", needs=Stage.STEP, subsumes=("LRN401",))
def learning_rate_zero(evidence: Evidence) -> Iterator[Finding]:
    """A parameter whose learning rate is 0 in every observed step.

    ## Why it matters

    A warm-up that starts at 0 sets the rate to 0 when the scheduler is built; if the scheduler is
    never stepped, or only once an epoch, it stays there. A rate of 0 in the first step alone is
    normal.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    ```

    ## When to silence it

    The group is switched off by its rate on purpose; freezing it is cheaper.
    """
    schedules = len(evidence.happened("schedule"))
    for entry in evidence.trainable():
        stepped = [look for look in evidence.looks_at(entry) if look.stepped]
        if len(stepped) < 2 or any(look.lr for look in stepped):
            continue
        yield Finding(
            what="the learning rate is 0 in every observed step",
            where=list(entry.names),
            found=f"0 in {len(stepped)} of {len(stepped)} steps; "
            f"{schedules} calls of scheduler.step()",
            wanted="a rate above 0 in at least one of them",
        )
