"""LRN221: weight decay is meant where it happens."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.policy.kinds import kind_of


@rule("LRN221", needs=Stage.OPTIMIZER, severity="note")
def decay_by_habit(evidence: Evidence) -> Iterator[Finding]:
    """A token, position, gate, scale, norm or bias that is decayed toward zero.

    ## Why it matters

    Optimizers decay all they are given. For a scale that starts at 1, a gate or a position that is
    a slow pull toward a value nobody chose; most published code leaves these out. It is a
    convention, hence a note: DeiT's authors decay the distillation token on purpose.

    ## Example

    ```python
    model = nn.LayerNorm(4)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    step = None
    ```

    ## Use instead

    ```python
    model = nn.LayerNorm(4)
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3, weight_decay=0.05))
    step = None
    ```

    ## When to silence it

    The decay is meant: declare it with `ln.annotate(model, …, weight_decay=True)`.
    """
    for entry in evidence.trainable():
        coefficients = [g.options.get("weight_decay", 0) for g in evidence.groups_of(entry)]
        if not evidence.has_shape(entry) or not any(coefficients):
            continue
        kind = kind_of(entry)
        said = [p.note.get("weight_decay") for p in entry.places]
        if not kind.decays and not any(s not in (None, False) for s in said):
            yield Finding(
                what="a parameter of a kind that is usually not decayed is decayed toward zero",
                where=list(entry.names),
                found=f"weight decay {max(coefficients):g}",
                wanted=f"0, as in {kind.follows}" if len(kind.follows) < 60 else "0",
            )
