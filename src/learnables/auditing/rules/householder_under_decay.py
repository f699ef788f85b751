"""LRN721: torch's householder parametrization is never decayed."""

from collections.abc import Iterator

from torch.nn.utils import parametrize

from learnables._torch import parametrization_of
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN721", needs=Stage.OPTIMIZER, subsumes=("LRN4",))
def householder_under_decay(evidence: Evidence) -> Iterator[Finding]:
    """A weight under `parametrizations.orthogonal` that weight decay sets to zero.

    ## Why it matters

    The `householder` map, which torch takes by default for every real matrix that is not square,
    multiplies by `X.diagonal().int()`. The diagonal starts at −1; after one step with any decay
    it is −0.9999, which `int()` makes 0, and the whole weight is 0 from then on. AdamW decays by
    default.

    ## Example

    ```python
    model = nn.utils.parametrizations.orthogonal(nn.Linear(4, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 8)
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3, weight_decay=0.01))
    ln.constrain(model, "weight", ln.sets.Orthogonal(), optimizer=optimizer)
    ```

    ## When to silence it

    Never: the weight is lost.
    """
    for entry in evidence.trainable():
        owner = entry.owner
        if not isinstance(owner, parametrize.ParametrizationList):
            continue
        maps = [parametrization_of(step) for step in owner.children()]
        decay = max(
            (g.options.get("weight_decay", 0) for g in evidence.groups_of(entry)), default=0
        )
        if "orthogonal: householder" in maps and decay:
            yield Finding(
                what="weight decay sets a householder-parametrized weight to zero",
                where=list(entry.names),
                found=f"weight decay {decay:g}",
                wanted="0, or another map: orthogonal(module, orthogonal_map='matrix_exp')",
            )
