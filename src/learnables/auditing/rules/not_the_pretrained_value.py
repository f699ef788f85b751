"""LRN710: a parameter starts from the value it is meant to start from."""

from collections.abc import Iterator

import torch

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule


@rule("LRN710", needs=Stage.MODEL, subsumes=("LRN801",))
def not_the_pretrained_value(evidence: Evidence) -> Iterator[Finding]:
    """A parameter whose value before the first step is not the declared pretrained one.

    ## Why it matters

    Something after the loading wrote over it: an initialiser that runs over all modules, a resize,
    a second loading. Training works, from scratch.

    ## Example

    ```python
    model = nn.Linear(4, 4)
    intent = ln.Intent(pretrained={"weight": torch.eye(4)})
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)
    nn.init.eye_(model.weight)
    intent = ln.Intent(pretrained={"weight": torch.eye(4)})
    ```

    ## When to silence it

    The declared value is out of date; correct it instead.
    """
    for name, wanted in needed(
        evidence.intent.pretrained, "intent=ln.Intent(pretrained={…})"
    ).items():
        for entry in evidence.entries_named(name):
            value = evidence.first.get(entry.param)
            if value is None:
                continue
            if value.shape != wanted.shape:
                found = f"shape {tuple(value.shape)}"
            elif not torch.allclose(
                value.double(), wanted.to(value).double(), rtol=1e-5, atol=1e-8
            ):
                gap = float((value.double() - wanted.to(value).double()).abs().max())
                found = f"difference up to {gap:.2g}"
            else:
                continue
            yield Finding(
                what="a parameter does not start from its pretrained value",
                where=list(entry.names),
                found=found,
                wanted=f"the declared value, shape {tuple(wanted.shape)}",
            )
