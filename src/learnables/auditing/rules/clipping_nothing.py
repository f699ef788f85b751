"""LRN407: clipping is given parameters."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN407", needs=Stage.STEP, subsumes=("LRN410",))
def clipping_nothing(evidence: Evidence) -> Iterator[Finding]:
    """Gradient clipping that is given no parameter.

    ## Why it matters

    An iterator (`filter(...)`, a generator) that was stored once is empty after its first use:
    every later call clips nothing and returns 0.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clipped = filter(lambda p: p.requires_grad, model.parameters())

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(clipped, 1.0)
        optimizer.step()
        return loss

    step()
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clipped = [p for p in model.parameters() if p.requires_grad]

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(clipped, 1.0)
        optimizer.step()
        return loss

    step()
    ```

    ## When to silence it

    The list is empty on purpose in some iterations.
    """
    clips = evidence.happened("clip")
    empty = [event for event in clips if not event.params]
    if not empty:
        return
    at = empty[0].location
    meant = {i for event in clips if event.location == at for i in event.ids}
    for entry in evidence.trainable():
        if id(entry.param) in meant or (not meant and evidence.ever(entry, "stepped")):
            same = [event for event in clips if event.location == at]
            yield Finding(
                what="gradient clipping is given no parameter",
                where=list(entry.names),
                found=f"0 parameters in {len(empty)} of {len(same)} calls",
                wanted="the same parameters in every call",
                location=at,
            )
