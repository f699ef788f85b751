"""LRN727: a fresh value has the spread that its initialiser aims at."""

import math
from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule
from learnables.init.base import Initializer
from learnables.sets.constraint import constraint_of


@rule("LRN727", needs=Stage.OPTIMIZER, severity="note")
def not_as_initialised(evidence: Evidence) -> Iterator[Finding]:
    """A fresh parameter whose standard deviation is not the one that was declared.

    ## Why it matters

    Something wrote over the declared value before training: a loop over `model.modules()` that
    initialises every weight alike, or a function that goes wrong in half precision (an older
    `trunc_normal_` makes 0.09 out of 0.02 in bf16, with hundreds of values at the bound).

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = ln.parameter(4, 64, init=ln.init.trunc_normal(0.02))

        def forward(self, x):
            return x @ self.w

    model = Net()
    for p in model.parameters():
        nn.init.normal_(p)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = ln.parameter(4, 64, init=ln.init.trunc_normal(0.02))

        def forward(self, x):
            return x @ self.w

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## When to silence it

    The value was loaded, or comes from somewhere better than the initialiser.
    """
    begun = evidence.loaded is not None or any(seen.optimizer.state for seen in evidence.optimizers)
    needed(None if begun else evidence, "a training that begins")
    for entry in evidence.entries:
        init = next((i for p in entry.places if (i := p.note.get("init")) is not None), None)
        value = evidence.first.get(entry.param)
        if not isinstance(init, Initializer) or value is None or value.numel() < 32:
            continue
        if constraint_of(entry) is not None:  # was projected since
            continue
        role = next((r for p in entry.places if (r := p.note.get("role")) is not None), None)
        wanted = init.wanted_std(entry.shape, role=role)
        if not wanted or not value.is_floating_point():
            continue
        found = float(value.double().std())
        # Six standard errors of a normal sample, and a quarter for what the initialiser rounds.
        if abs(found / wanted - 1) > 0.25 + 6 / math.sqrt(2 * value.numel()):
            yield Finding(
                what="a fresh value does not have the spread that was declared",
                where=list(entry.names),
                found=f"standard deviation {found:.3g}",
                wanted=f"{wanted:.3g}, by {init!r}",
            )
