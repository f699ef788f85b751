"""LRN501: a parameter has a finite value before the first step."""

from collections.abc import Iterator

import torch

from learnables.auditing.evidence import Evidence, Stage, amount_of
from learnables.auditing.rule import Finding, needed, rule

ABSURD = 1e12  # no initialiser comes near it; freshly allocated memory read as floats does


@rule(
    "LRN501",
    needs=Stage.MODEL,
    subsumes=("LRN302", "LRN303", "LRN305", "LRN4", "LRN605"),
)
def not_finite_at_start(evidence: Evidence) -> Iterator[Finding]:
    """A parameter that is NaN, infinite or absurdly large before anything was trained.

    ## Why it matters

    `torch.empty`, `torch.Tensor(3, 3)`, `to_empty` after construction on the meta device, and
    loaders that skip initialisation all hand out memory as it is. Where no line fills it, the
    parameter starts from whatever lay there: often zeros in a test, and garbage in the long run.

    ## Example

    ```python
    model = nn.Linear(4, 4)
    model.token = nn.Parameter(torch.full((4,), float("nan")))  # as uninitialised memory may be
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = None
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)
    model.token = ln.parameter(4, init=ln.init.trunc_normal(0.02))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = None
    ```

    ## When to silence it

    Never; fill the value first.
    """
    for entry in evidence.entries:
        value = evidence.first.get(entry.param)
        if value is None or not (value.is_floating_point() or value.is_complex()):
            continue
        amount = amount_of(value)
        if amount.nonfinite:
            found = f"{amount.nonfinite} of {amount.count} entries NaN or infinite"
        elif amount.absmax > ABSURD and value.dtype != torch.float64:
            found = f"entries up to {amount.absmax:.1e}"
        else:
            continue
        yield Finding(
            what="a parameter has no sensible value before the first step",
            where=list(entry.names),
            found=found,
            wanted="an initial value that some line of code chose",
        )
    needed(evidence.first, "values that fit into the memory budget")
