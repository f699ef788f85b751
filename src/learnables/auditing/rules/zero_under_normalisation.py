"""LRN729: what is divided by its norm is not zero."""

from collections.abc import Iterator

from torch.nn.utils import parametrize

from learnables._torch import parametrization_of
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN729", needs=Stage.MODEL, subsumes=("LRN3", "LRN4", "LRN5", "LRN605"))
def zero_under_normalisation(evidence: Evidence) -> Iterator[Finding]:
    """A zero weight, or a zero row, under `spectral_norm` or `weight_norm`.

    ## Why it matters

    Both divide by a norm, and 0 / 0 is NaN: the first forward returns NaN, the first backward makes
    every gradient NaN. Layers that start at zero on purpose, such as the last one of a residual
    branch, are where it happens.

    ## Example

    ```python
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.weight)
    nn.utils.parametrizations.weight_norm(model)
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ln.constrain(model, "weight", ln.sets.SpectralBall(), optimizer=optimizer)
    step = None
    ```

    ## When to silence it

    Never: the layer computes NaN.
    """
    for entry in evidence.entries:
        owner, value = entry.owner, evidence.first.get(entry.param)
        if not isinstance(owner, parametrize.ParametrizationList) or value is None:
            continue
        kinds = {parametrization_of(step) for step in owner.children()}
        if "spectral_norm" in kinds:
            zero = 0 if bool(value.any()) else 1
        elif "weight_norm" in kinds and entry.local_name == "original1":
            zero = int((~value.flatten(1).any(1)).sum())
        else:
            continue
        if zero:
            yield Finding(
                what="a zero weight is divided by its norm",
                where=list(entry.names),
                found=f"{', '.join(sorted(kinds))} of "
                + (f"{zero} zero rows" if "weight_norm" in kinds else "a zero matrix"),
                wanted="a value that is not zero, or ln.sets.SpectralBall(), where zero stays zero",
            )
