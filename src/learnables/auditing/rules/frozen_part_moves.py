"""LRN709: rows that are meant to stay, and masked entries, stay."""

from collections.abc import Iterator

import torch
from torch import Tensor

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule


@rule("LRN709", needs=Stage.MODEL)
def frozen_part_moves(evidence: Evidence) -> Iterator[Finding]:
    """Frozen rows that move, or entries outside a mask that are not zero.

    ## Why it matters

    `requires_grad` is all or nothing, so a part is frozen by clearing its gradient. Weight decay
    and momentum move it all the same, and a pruned weight comes back.

    ## Example

    ```python
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    intent = ln.Intent(frozen_rows={"weight": [0]})
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    intent = ln.Intent(frozen_rows={"weight": [0]})
    first = model.weight.detach()[0].clone()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def step():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        model.weight.data[0] = first
        return loss
    ```

    ## When to silence it

    The part is frozen only later in training.
    """
    intent = evidence.intent
    needed([*intent.frozen_rows, *intent.masks], "intent=ln.Intent(frozen_rows={…}, masks={…})")
    for name, rows in intent.frozen_rows.items():
        for entry in evidence.entries_named(name):
            first, last = evidence.first.get(entry.param), evidence.last.get(entry.param)
            if first is None or last is None:
                continue
            index = torch.as_tensor(rows)
            moved = (
                (first[index] != last[index]).flatten(1).any(1)
                if first.ndim > 1
                else (first[index] != last[index])
            )
            if bool(moved.any()):
                yield Finding(
                    what="rows that are meant to be frozen move",
                    where=list(entry.names),
                    found=f"{int(moved.sum())} of {moved.numel()} frozen rows changed in "
                    f"{evidence.n_of_n}",
                    wanted="0",
                )
    for name, mask in intent.masks.items():
        for entry in evidence.entries_named(name):
            value = evidence.last.get(entry.param, evidence.first.get(entry.param))
            if value is not None and (alive := _outside(value, mask)):
                yield Finding(
                    what="entries outside the mask are not zero",
                    where=list(entry.names),
                    found=f"{alive} entries where the mask is 0",
                    wanted="0",
                )


def _outside(value: Tensor, mask: Tensor) -> int:
    return int(((mask == 0) & (value != 0)).sum())
