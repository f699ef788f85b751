"""LRN413: an iteration calls backward."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN413", needs=Stage.MODEL, subsumes=("LRN3", "LRN4"))
def no_backward(evidence: Evidence) -> Iterator[Finding]:
    """Iterations in which nothing computes a gradient.

    ## Why it matters

    Nothing can be learned, whatever the loss says.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        optimizer.step()
        return loss
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## When to silence it

    The parameters are updated without gradients, by a rule or by evolution.
    """
    filled = any(look.gradient for looks in evidence.looks.values() for look in looks)
    if evidence.iterations and not evidence.happened("backward", "grad") and not filled:
        trainable = [entry.name for entry in evidence.trainable()]
        yield Finding(
            what="no backward is called",
            where=trainable,
            found=f"0 calls in {evidence.iterations} observed iterations, "
            f"{len(trainable)} trainable parameters",
            wanted="at least one call",
        )
