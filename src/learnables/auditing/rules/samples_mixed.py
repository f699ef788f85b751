"""LRN311: what the model says of one sample does not depend on the others of its batch."""

import math
from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, SkipRule, rule


@rule("LRN311", needs=Stage.MODEL, severity="warning")
def samples_mixed(evidence: Evidence) -> Iterator[Finding]:
    """An output for one sample that changes with the other samples of its batch.

    ## Why it matters

    A product over the wrong dimension, statistics over the batch, a `view` that puts samples side
    by side: training works, and in use each answer depends on who else asked. Judged in evaluation
    mode, where the batch is handed over: `ln.audit(model, optimizer, step, batch=x)`.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x - x.mean(0))  # the mean of the whole batch

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batch = torch.randn(8, 4)
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x - x.mean(1, keepdim=True))

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batch = torch.randn(8, 4)
    ```

    ## When to silence it

    The batch is one object: the nodes of a graph, a contrastive table.

    Raises:
        SkipRule: No batch was handed over, or the model cannot be called with it.
    """
    made = evidence.experiments
    if made.mixing is None:
        raise SkipRule(f"needs {made.reasons.get('batch', 'a batch to call the model with')}")
    for mixing in made.mixing:
        output = f"the output {mixing.output}" if mixing.output else "the output"
        how = f"changes by {mixing.difference:.1e} of its largest value"
        if math.isnan(mixing.difference):
            how = f"has shape {mixing.of_some}"
        yield Finding(
            what="the model mixes the samples of a batch",
            where=[],
            found=f"{output} of shape {mixing.shape} {how} for half of the samples",
            wanted="the same answer for a sample in any company",
        )
