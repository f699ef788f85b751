"""LRN504: a model on the meta device is there as a whole."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN504", needs=Stage.MODEL, severity="note", subsumes=("LRN501",))
def made_beside_meta(evidence: Evidence) -> Iterator[Finding]:
    """A parameter with memory of its own in a model that was built on the meta device.

    ## Why it matters

    `torch.Tensor(n)` and `torch.FloatTensor(n)` do not look at `torch.device("meta")`: they hand
    out real memory as it is. Loaders that build on the meta device leave out the initialisers,
    fill what the checkpoint has, and take such a parameter for one that has its value. It keeps
    garbage, or what lay in the memory of the process that saved it. Values are judged once the
    whole model has memory.

    ## Example

    ```python
    with torch.device("meta"):
        model = nn.Linear(4, 4)
        model.scale = nn.Parameter(torch.Tensor(4))  # real memory, uninitialised
    optimizer = None
    step = None
    ```

    ## Use instead

    ```python
    with torch.device("meta"):
        model = nn.Linear(4, 4)
        model.scale = nn.Parameter(torch.empty(4))
    optimizer = None
    step = None
    ```

    ## When to silence it

    The rest of the model is offloaded, or is materialised module by module.
    """
    real = [entry for entry in evidence.entries if not entry.param.is_meta]
    if len(real) == len(evidence.entries):
        return
    for entry in real:
        yield Finding(
            what="a parameter has memory of its own in a model on the meta device",
            where=list(entry.names),
            found=entry.looks,
            wanted="device meta, as the others; torch.empty in the place of torch.Tensor",
        )
