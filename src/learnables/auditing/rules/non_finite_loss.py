"""LRN414: the loss is a finite number."""

import math
from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN414", needs=Stage.BACKWARD, subsumes=("LRN302", "LRN303", "LRN40"))
def non_finite_loss(evidence: Evidence) -> Iterator[Finding]:
    """A loss that is NaN or infinite from the first observed iteration on.

    ## Why it matters

    Every gradient is NaN then. The cause lies in the forward: in its inputs, in a parameter that is
    NaN already, or in a logarithm, a division or an overflow.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).log().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = F.softplus(model(torch.randn(8, 4))).log().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## When to silence it

    Never.
    """
    losses = [e.details["loss"] for e in evidence.happened("backward")]
    losses = [loss for loss in losses if loss is not None]
    if losses and not math.isfinite(losses[0]) and not evidence.is_poisoned(0):
        bad = sum(not math.isfinite(loss) for loss in losses)
        yield Finding(
            what="the loss is not finite",
            where=[],
            found=f"{losses[0]} in the first of {len(losses)} backwards, not finite in {bad}",
            wanted="a finite number",
            location=evidence.happened("backward")[0].location,
        )
