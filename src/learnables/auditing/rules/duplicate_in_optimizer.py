"""LRN202: no parameter is stepped twice."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN202", needs=Stage.OPTIMIZER, subsumes=("LRN4",))
def duplicate_in_optimizer(evidence: Evidence) -> Iterator[Finding]:
    """A parameter that several groups or several optimizers hold.

    ## Why it matters

    Each occurrence steps it, with its own learning rate, decay and moments: the update is the sum
    of all of them. One optimizer refuses the same parameter in two groups; two optimizers accept
    it, and so does one group that lists it twice.

    ## Example

    ```python
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizers = [optimizer, torch.optim.SGD([model.bias], lr=0.1)]
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW([model.weight])
    optimizers = [optimizer, torch.optim.SGD([model.bias], lr=0.1)]
    ```

    ## When to silence it

    Two optimizers take turns on the parameter, as in alternating phases of training.
    """
    stepping = {id(event.subject) for event in evidence.happened("step")}
    for entry in evidence.entries:
        holders = [
            f"{seen.name} group {group.index}"
            for seen in evidence.optimizers
            if seen.given or id(seen.optimizer) in stepping
            for group in seen.groups
            for param in group.params
            if param is entry.param
        ]
        rebuilt = {id(event.subject) for event in evidence.happened("optimizer")}
        if len(holders) > 1 and not rebuilt:
            yield Finding(
                what="parameter is held more than once by optimizers",
                where=list(entry.names),
                found=", ".join(holders),
                wanted="exactly one group of one optimizer",
            )
