"""LRN724: an orthogonal parametrization is not evaluated in half precision."""

from collections.abc import Iterator

from torch.nn.utils import parametrize

from learnables._torch import parametrization_of
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule


@rule("LRN724", needs=Stage.MODEL, severity="warning")
def parametrized_under_autocast(evidence: Evidence) -> Iterator[Finding]:
    """An orthogonal parametrization of torch or geotorch in mixed-precision training.

    ## Why it matters

    The weight is computed in the forward, by matrix products that autocast runs in half precision:
    the defect `‖WᵀW − I‖` goes from 3e-6 to 3e-2, and the weight comes out as bf16.

    ## Example

    ```python
    model = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    scaler = torch.amp.GradScaler("cpu")
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)
    ln.constrain(model, "weight", ln.sets.Orthogonal(), how="parametrize")
    scaler = torch.amp.GradScaler("cpu")
    ```

    ## When to silence it

    The forward of the parametrized module runs outside autocast.
    """
    needed(evidence.scalers, "a gradient scaler")
    for entry in evidence.entries:
        owner = entry.owner
        if not isinstance(owner, parametrize.ParametrizationList):
            continue
        for step in owner.children():
            kind = parametrization_of(step)
            theirs = type(step).__module__.startswith("geotorch")
            if kind.startswith("orthogonal") or theirs:
                yield Finding(
                    what="an orthogonal weight is computed in half precision under autocast",
                    where=list(entry.names),
                    found=kind or f"geotorch {type(step).__name__}",
                    wanted="a map that switches autocast off, or a projection after the step",
                )
