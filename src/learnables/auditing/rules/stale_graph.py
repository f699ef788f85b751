"""LRN305: a gradient comes through a graph of the same iteration."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN305", needs=Stage.BACKWARD, subsumes=("LRN301", "LRN302", "LRN4"))
def stale_graph(evidence: Evidence) -> Iterator[Finding]:
    """A parameter whose gradient comes through a value that was computed before the iteration.

    ## Why it matters

    A value derived from the parameter is computed once, at construction or in a cache, and used
    ever after. The parameter receives gradients and moves, and the output does not follow.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(4))
            self.scale = torch.cat([self.log_scale[:2], self.log_scale[2:]])  # once, for speed
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x * (1 + self.scale))

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(4))
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            scale = torch.cat([self.log_scale[:2], self.log_scale[2:]])
            return self.fc(x * (1 + scale))

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## When to silence it

    The value is refreshed every so many iterations, on purpose.
    """
    backwards = evidence.happened("backward")
    for entry in evidence.trainable():
        stale = [e for e in backwards if any(p is entry.param for p in e.details["stale"])]
        if not stale:
            continue
        ending = evidence.endings.get(entry)
        at = ending.location if ending and ending.kind == "stale" else None
        yield Finding(
            what="the gradient comes through a value computed before the iteration",
            where=list(entry.names),
            found=f"a graph older than the iteration in {len(stale)} of {len(backwards)} backwards",
            wanted="the value computed anew in each forward",
            location=at,
        )
