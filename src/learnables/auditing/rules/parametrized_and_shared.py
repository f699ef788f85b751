"""LRN723: a parameter is shared or parametrized, not both."""

from collections.abc import Iterator

from torch.nn.utils import parametrize

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN723", needs=Stage.MODEL, subsumes=("LRN4",))
def parametrized_and_shared(evidence: Evidence) -> Iterator[Finding]:
    """One Parameter that is a weight here and the raw input of a parametrization there.

    ## Why it matters

    `register_parametrization` keeps the Parameter as `original` and may write into it: torch's
    orthogonal map leaves −I there. The other module goes on using that as its weight. Nothing
    warns, and the two weights are no longer equal.

    ## Example

    ```python
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    nn.utils.parametrizations.orthogonal(model[0])
    ```

    ## Use instead

    ```python
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ln.constrain(model, model[0].weight, ln.sets.Orthogonal(), optimizer=optimizer)
    ```

    ## When to silence it

    Both sides are parametrized and read nothing but the computed weight.
    """
    for entry in evidence.entries:
        inner = [isinstance(p.owner, parametrize.ParametrizationList) for p in entry.places]
        if any(inner) and not all(inner):
            yield Finding(
                what="a shared Parameter is parametrized on one side only",
                where=list(entry.names),
                found="the weight of one module, the raw input of a parametrization in another",
                wanted="one of the two: the shared Parameter projected after each step",
            )
