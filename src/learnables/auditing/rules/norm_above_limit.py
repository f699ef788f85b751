"""LRN410: the gradient norm stays below its limit."""

import math
from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule


@rule("LRN410", needs=Stage.STEP)
def norm_above_limit(evidence: Evidence) -> Iterator[Finding]:
    """A step whose gradient norm is above the limit that was declared.

    ## Why it matters

    The clipping does not reach the gradients that the step consumes: it comes too early, it is
    given other parameters, or it is not called.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    intent = ln.Intent(max_norm=1e-3)
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    intent = ln.Intent(max_norm=1e-3)

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        return loss
    ```

    ## When to silence it

    The limit is meant per parameter.
    """
    limit = needed(evidence.intent.max_norm, "intent=ln.Intent(max_norm=…)")
    for i in range(evidence.iterations):
        looks = {e: evidence.looks_at(e)[i] for e in evidence.trainable() if evidence.looks_at(e)}
        consumed = {e: look.gradient for e, look in looks.items() if look.stepped and look.gradient}
        norm = math.sqrt(sum(gradient.norm**2 for gradient in consumed.values()))
        if norm > 1.01 * limit:
            yield Finding(
                what="a step consumes gradients above the declared norm",
                where=[name for entry in consumed for name in entry.names],
                found=f"‖gradient‖ = {norm:.3g} in iteration {i + 1}",
                wanted=f"≤ {limit:g}",
            )
            return
