"""LRN102: a Parameter is registered itself, not the result of converting it."""

from collections.abc import Iterator

from learnables._torch import chain_to_leaf
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN102", needs=Stage.MODEL, subsumes=("LRN3", "LRN412"))
def lost_by_conversion(evidence: Evidence) -> Iterator[Finding]:
    """An attribute that holds the result of a call on a Parameter that nobody registers.

    ## Why it matters

    `nn.Parameter(...).to(...)`, `.cuda()`, `.half()`, `.view(...)` or a product with it give a
    plain tensor back. The Parameter itself is unreachable: it is not trained, saved or moved.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos = nn.Parameter(torch.zeros(4, dtype=torch.float64)).to(torch.float32)
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x + self.pos)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos = nn.Parameter(torch.zeros(4, dtype=torch.float64).to(torch.float32))
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x + self.pos)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## When to silence it

    The attribute is the kept output of an earlier forward.
    """
    for held in evidence.held_as("attribute"):
        found = chain_to_leaf(held.tensor)
        if found is None:
            continue
        leaf, calls = found
        if evidence.name_of(leaf) is None:
            yield Finding(
                what="the attribute is the result of a call on a Parameter that is not registered",
                where=[held.name],
                found=f"a plain tensor, made from a leaf by {' and '.join(calls)}",
                wanted="nn.Parameter around the converted tensor",
            )
