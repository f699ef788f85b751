"""LRN640: under autocast no parameter makes the activations float32."""

from collections import defaultdict
from collections.abc import Iterator

from learnables._torch import dtype_name
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.runtime.precision import Promotion


@rule("LRN640", needs=Stage.BACKWARD, severity="note")
def promoted_by_a_parameter(evidence: Evidence) -> Iterator[Finding]:
    """A float32 parameter that makes activations float32 where autocast is to keep them small.

    ## Why it matters

    Autocast casts the inputs of matrix products only. A class token joined to the patches, a
    position added, a scale multiplied: one float32 Parameter among the inputs makes the result
    float32, and from there on the whole residual stream, twice the memory for the backward.

    ## Example

    ```python
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.gamma = nn.Parameter(torch.full((4,), 0.5))

        def forward(self, x):
            return self.fc(x) * self.gamma

    model = Scaled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## Use instead

    ```python
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.gamma = ln.parameter(torch.full((4,), 0.5), compute_dtype="autocast")

        def forward(self, x):
            return self.fc(x) * self.gamma

    model = Scaled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    Where autocast is entered inside the module's own forward, name the dtype instead:
    `compute_dtype=torch.bfloat16`.

    ## When to silence it

    The stream is meant to be float32, for its accuracy.
    """
    by_name: dict[str, list[Promotion]] = defaultdict(list)
    for promotion in evidence.promotions:
        by_name[promotion.parameter].append(promotion)
    entry_of = {name: entry for entry in evidence.entries for name in entry.names}
    for name, found in by_name.items():
        entry = entry_of.get(name)
        made = [one for one in found if one.how == "made"]
        if entry is None or not made:
            continue
        low = dtype_name(made[0].low)
        size = sum(one.bytes for one in found) // max(evidence.iterations, 1)
        yield Finding(
            what="a parameter makes activations float32",
            where=list(entry.names),
            found=f"float32 of shape {made[0].shape} by {made[0].op}; with what follows from it "
            f"{size:,} bytes more in each iteration",
            wanted=f"{low}, as the other input has it",
            mend=f"ln.annotate(model, {entry.name!r}, compute_dtype='autocast')",
            location=made[0].location or None,
        )
