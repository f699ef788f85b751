"""LRN722: a parameter of fixed size is not decayed."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.sets.constraint import constraint_of


@rule("LRN722", needs=Stage.OPTIMIZER, severity="note")
def decay_against_a_constraint(evidence: Evidence) -> Iterator[Finding]:
    """Weight decay of a parameter whose set fixes its size.

    ## Why it matters

    The projection puts back what the decay takes away. What remains of it is a learning rate that
    grows: the step is the same and the value shorter when it is applied.

    ## Example

    ```python
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    ln.constrain(model, "weight", ln.sets.Sphere(), optimizer=optimizer)
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)
    ln.annotate(model, "weight", constraint=ln.sets.Sphere())
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3, weight_decay=0.1))
    ln.attach(model, optimizer)
    ```

    ## When to silence it

    The faster effective rate is meant.
    """
    for entry in evidence.trainable():
        constraint = constraint_of(entry)
        decay = max(
            (g.options.get("weight_decay", 0) for g in evidence.groups_of(entry)), default=0
        )
        if constraint is not None and constraint.fixes_size and decay:
            yield Finding(
                what="a parameter whose set fixes its size is decayed",
                where=list(entry.names),
                found=f"weight decay {decay:g} of a parameter in {constraint!r}",
                wanted="0",
            )
