"""LRN310: where a parameter moves along its gradient, the loss changes as the gradient says."""

import math
from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, SkipRule, rule


@rule("LRN310", needs=Stage.BACKWARD, severity="warning")
def gradient_is_not_the_slope(evidence: Evidence) -> Iterator[Finding]:
    """A gradient that is not the derivative of the loss that the step differentiates.

    ## Why it matters

    A `detach()` in one of two branches, a value that is kept from an earlier iteration, a backward
    written by hand: the parameter moves at every step, and not downhill. Nothing but moving the
    parameter and looking at the loss tells this from a gradient that is right. On request:
    `ln.audit(model, optimizer, step, probes=["gradient"])`.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((4,), 0.5))
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x * self.scale * self.scale.detach())  # half of the derivative is gone

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    probes = ["gradient"]
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((4,), 0.5))
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x * self.scale.square())

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    probes = ["gradient"]
    ```

    ## When to silence it

    The gradient is a surrogate on purpose (straight-through, stop-gradient targets);
    `ln.Intent(surrogate=[...])` says so too.

    Raises:
        SkipRule: The probe was not asked for, or could not tell.
    """
    made = evidence.experiments
    if made.slopes is None:
        raise SkipRule(f"needs {made.reasons.get('gradient', _ASK)}")
    meant = set(map(id, evidence.meant(evidence.intent.surrogate)))
    for entry in evidence.trainable():
        slope = made.slopes.get(entry.param)
        if slope is None or math.isnan(slope.numeric) or id(entry) in meant:
            continue
        if not slope.analytic:
            continue  # that no gradient comes is said elsewhere
        yield Finding(
            what="the gradient is not the slope of the loss",
            where=list(entry.names),
            found=f"the gradient says {slope.analytic:.3g}, the loss changes by "
            f"{slope.numeric:.3g} along it",
            wanted="the same within 10 %",
        )


_ASK = "to be asked for: probes=['gradient']"
