"""LRN725: a constrained parameter is stored in a dtype that can hold it."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.sets.base import computing_dtype
from learnables.sets.constraint import constraint_of


@rule("LRN725", needs=Stage.MODEL, severity="warning")
def constrained_in_half_precision(evidence: Evidence) -> Iterator[Finding]:
    """A constrained parameter that is stored in half precision.

    ## Why it matters

    Rounding alone takes the value out of the set: an orthogonal 64 × 64 matrix stored in bf16 has a
    defect of 1.9e-2, whatever is computed before. Small steps round back to where they began.

    ## Example

    ```python
    model = nn.Linear(8, 8).bfloat16()
    ln.annotate(model, "weight", constraint=ln.sets.Orthogonal())
    ```

    ## Use instead

    ```python
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ln.constrain(model, "weight", ln.sets.Orthogonal(), optimizer=optimizer)
    step = None
    ```

    ## When to silence it

    The rough set is good enough, and the optimizer keeps values in fp32.
    """
    for entry in evidence.entries:
        constraint = constraint_of(entry)
        if constraint is None or not evidence.has_shape(entry):
            continue
        if not entry.param.is_floating_point() or computing_dtype(entry.dtype) == entry.dtype:
            continue
        floor = constraint.floor(entry.shape, entry.dtype)
        if floor > 1e-3 * constraint.set.scale:
            yield Finding(
                what="a constrained parameter is stored in half precision",
                where=list(entry.names),
                found=f"{entry.looks}: rounding alone makes {constraint.set.measure} ≈ {floor:.1e}",
                wanted="float32, under autocast where half precision is meant",
            )
