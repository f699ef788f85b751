"""LRN302: the gradient of a trainable parameter is not always exactly zero."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.auditing.rules.no_gradient import in_words


@rule("LRN302", needs=Stage.BACKWARD, subsumes=("LRN4",))
def zero_gradient(evidence: Evidence) -> Iterator[Finding]:
    """A trainable parameter whose gradient is exactly zero in every observed iteration.

    ## Why it matters

    It is in the graph, so a check for None passes, and yet it cannot learn: a softmax over one
    element, a saturated clamp, a dead ReLU or a factor that is always 0 lies between it and the
    loss. A zero gradient in the *first* iteration is normal (a gate that starts at 0, LoRA's B).

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(1, 1)
            self.fc = nn.Linear(1, 1)

        def forward(self, x):
            tokens = x.unsqueeze(-1)
            return self.fc((self.score(tokens).softmax(-1) * tokens).sum(1))

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(1, 1, bias=False)
            self.fc = nn.Linear(1, 1)

        def forward(self, x):
            tokens = x.unsqueeze(-1)
            return self.fc((self.score(tokens).softmax(1) * tokens).sum(1))

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## When to silence it

    The parameter serves inputs that did not occur in the observed iterations.
    """
    for entry in evidence.trainable():
        arrived = [
            event.arrived[entry.param]
            for event in evidence.happened("backward")
            if entry.param in event.arrived
        ]
        if not arrived or not all(amount.is_zero for amount in arrived):
            continue
        ending = evidence.endings.get(entry)
        yield Finding(
            what="the gradient of a trainable parameter is always exactly zero",
            where=list(entry.names),
            found=f"0 in {len(arrived)} of {len(arrived)} backwards; {in_words(ending)}",
            wanted="a gradient that is not 0 in at least one of them",
            location=ending.location if ending else None,
        )
