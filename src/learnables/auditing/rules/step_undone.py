"""LRN417: what a step changes stays changed."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN417", needs=Stage.STEP, subsumes=("LRN40", "LRN7"))
def step_undone(evidence: Evidence) -> Iterator[Finding]:
    """A parameter that every step moves and that is back at its old value for the next forward.

    ## Why it matters

    The optimizer works, "did it change" says yes, and the forward always sees the same value: the
    forward rewrites it, or the loop loads an old state back.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 4))

        def forward(self, x):
            self.weight.data.fill_(1.0)
            return F.linear(x, self.weight)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 4))

        def forward(self, x):
            return F.linear(x, self.weight)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## When to silence it

    The parameter is a set-point that is reset on purpose.
    """
    loads = evidence.happened("load")
    for entry in evidence.trainable():
        looks = evidence.looks_at(entry)
        stepped = [i for i, look in enumerate(looks[:-1]) if "step" in look.changes]
        if len(stepped) < 2 or not all(looks[i + 1].back_at_start for i in stepped):
            continue
        loaded = next((e.location for e in loads if id(entry.param) in e.ids), None)
        yield Finding(
            what="every change that the step makes is undone before the next forward",
            where=list(entry.names),
            found=f"the old value, bit for bit, after {len(stepped)} of {len(stepped)} steps",
            wanted="the value that the step left",
            location=evidence.written.get(id(entry.param)) or loaded,
        )
