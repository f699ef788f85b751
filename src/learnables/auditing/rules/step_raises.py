"""LRN412: the step runs."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN412", needs=Stage.MODEL, subsumes=("LRN3", "LRN4"))
def step_raises(evidence: Evidence) -> Iterator[Finding]:
    """A training iteration that raises an error.

    ## Why it matters

    What happens after it cannot be judged. The state is put back as it was before the first
    observed iteration.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = iter([torch.randn(8, 4), torch.randn(8, 4)])

    def step():
        optimizer.zero_grad()
        loss = model(next(batches)).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.randn(8, 4), torch.randn(8, 4)]
    count = 0

    def step():
        global count
        count += 1
        optimizer.zero_grad()
        loss = model(batches[count % 2]).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## When to silence it

    Never; make the step run, or lower `steps`.
    """
    crash = evidence.crash
    if crash is not None:
        ended = isinstance(crash.error, StopIteration)
        yield Finding(
            what="the step raises" if not ended else "the step has no more data",
            where=[],
            found=f"{type(crash.error).__name__}: {crash.error} in iteration {crash.iteration + 1}",
            wanted="a step that can be run again and again",
            location=crash.location,
        )
