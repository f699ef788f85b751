"""LRN203: the optimizer holds the parameters of the model."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN203", needs=Stage.OPTIMIZER, subsumes=("LRN2", "LRN3", "LRN40"))
def foreign_optimizer(evidence: Evidence) -> Iterator[Finding]:
    """An optimizer that holds not one parameter of the model.

    ## Why it matters

    It steps tensors that nobody uses, and raises no error. It was built for another model, before
    the model was converted, materialised from the meta device or sharded, or over a dict of copies
    as for `torch.func`.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(nn.Linear(4, 1).parameters(), lr=0.1)
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## When to silence it

    Never; hand the optimizer of this model to the audit.
    """
    mine = {id(entry.param) for entry in evidence.entries}
    given = [seen for seen in evidence.optimizers if seen.given]
    held = {id(p) for seen in evidence.optimizers for group in seen.groups for p in group.params}
    trainable = [name for entry in evidence.trainable() for name in entry.names]
    if not given or held & mine or not trainable:
        return
    strangers = [p for seen in given for group in seen.groups for p in group.params]
    meta = sum(p.device.type == "meta" for p in strangers)
    yield Finding(
        what="the optimizer holds no parameter of the model",
        where=trainable,
        found=f"{len(strangers)} tensors, 0 of them in the model"
        + (f", {meta} on the meta device" if meta else ""),
        wanted=f"the {len(trainable)} trainable parameters of the model",
    )
