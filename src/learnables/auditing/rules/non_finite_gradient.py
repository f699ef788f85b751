"""LRN303: gradients are finite."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN303", needs=Stage.BACKWARD, subsumes=("LRN301", "LRN302", "LRN304", "LRN4"))
def non_finite_gradient(evidence: Evidence) -> Iterator[Finding]:
    """A gradient that is NaN or infinite.

    ## Why it matters

    One step with it makes the parameter NaN, and soon everything else. A loop that skips such
    steps, or a `GradScaler`, hides it: nothing trains and the loss stays finite. Typical are a
    square root, a norm or a division at 0, and an SVD with equal singular values. Under a
    `GradScaler` the first steps may overflow while it looks for its scale; that is normal.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(torch.zeros(4))
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x * (1 + self.v)) + self.v.square().sum().sqrt()

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(torch.zeros(4))
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x * (1 + self.v)) + torch.linalg.vector_norm(self.v)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## When to silence it

    The loop detects it and recovers, and it is rare.
    """
    backwards = evidence.happened("backward")
    for entry in evidence.trainable():
        mine = [event for event in backwards if entry.param in event.arrived]
        bad = [event for event in mine if event.arrived[entry.param].nonfinite]
        scaled = all(event.details["scaled"] for event in bad)
        if (
            not bad
            or evidence.is_poisoned(bad[0].iteration)
            or (scaled and (len(bad) < len(mine) or len(bad) < 3))
        ):
            continue
        ending = evidence.endings.get(entry)
        amount = bad[0].arrived[entry.param]
        through = f"; {ending.op} gives it back" if ending and ending.kind == "silent" else ""
        yield Finding(
            what="the gradient is not finite",
            where=list(entry.names),
            found=f"{amount.nonfinite} of {amount.count} entries NaN or infinite, in "
            f"{len(bad)} of {len(mine)} backwards{through}",
            wanted="finite gradients",
            location=ending.location if ending else None,
        )
