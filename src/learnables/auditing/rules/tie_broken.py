"""LRN703: what is meant to be one Parameter is one."""

from collections.abc import Iterator

import torch
from torch import nn

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.entries import Entry


@rule("LRN703", needs=Stage.MODEL)
def tie_broken(evidence: Evidence) -> Iterator[Finding]:
    """Two names that are meant to share one Parameter and hold two.

    ## Why it matters

    A tie is the identity of an object, and many operations make new objects: `to_empty` and `.to`
    from the meta device, `load_state_dict(assign=True)`, copying a model in parts. Values are equal
    at first, so that nothing looks wrong; from the first step on the two drift apart.

    Without declared intent, an embedding and a linear layer that start with exactly the same values
    are taken for a broken tie.

    ## Example

    ```python
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    intent = ln.Intent(tied=[("embed.weight", "head.weight")])
    ```

    ## Use instead

    ```python
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    model["head"].weight = model["embed"].weight
    intent = ln.Intent(tied=[("embed.weight", "head.weight")])
    ```

    ## When to silence it

    One of the two is initialised from the other on purpose and then trained on its own.
    """
    told: set[int] = set()
    for group in evidence.intent.tied or ():
        members = [entry for name in group for entry in evidence.entries_named(name)]
        distinct = list({id(e): e for e in members}.values())
        if len(distinct) > 1:
            told |= {id(e) for e in distinct}
            yield _finding(distinct, "", "error")
    for one, other in _twins(evidence):
        if id(one) not in told and id(other) not in told:
            yield _finding([one, other], "; exactly equal before the first step", "warning")


def _finding(parts: list[Entry], more: str, severity: str) -> Finding:
    source, *targets = parts
    same_shape = all(t.shape == source.shape for t in targets)
    mend = "; ".join(f"ln.tie(model, {t.name!r}, {source.name!r})" for t in targets)
    return Finding(
        what="names that are meant to share one Parameter hold several",
        where=[name for entry in parts for name in entry.names],
        found=f"{len(parts)} Parameters{more}",
        wanted="one Parameter under all these names",
        mend=mend if same_shape else "",
        severity="error" if severity == "error" else "warning",
    )


def _twins(evidence: Evidence) -> Iterator[tuple[Entry, Entry]]:
    """Embedding and linear weights of one shape that start bit-equal, and not constant."""
    tables = [e for e in evidence.trainable() if isinstance(e.owner, nn.Embedding)]
    heads = [e for e in evidence.trainable() if isinstance(e.owner, nn.Linear)]
    for table in tables:
        for head in heads:
            a, b = evidence.first.get(table.param), evidence.first.get(head.param)
            if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
                continue
            if torch.equal(a, b) and bool((a != a.flatten()[0]).any()):
                yield table, head
