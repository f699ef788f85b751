"""LRN605: a step with finite gradients leaves finite values."""

from collections.abc import Iterator

from learnables._torch import dtype_name
from learnables.auditing.evidence import Evidence, Look, Phase, Stage
from learnables.auditing.rule import Finding, rule

BLAMED: dict[Phase, str] = {
    "forward": "something in the forward writes",
    "between": "something between backward and step writes",
    "step": "the optimizer's step writes",
    "after": "something after the optimizer's step writes",
}


@rule("LRN605", needs=Stage.STEP, subsumes=("LRN303", "LRN414"))
def turns_non_finite(evidence: Evidence) -> Iterator[Finding]:
    """A parameter that becomes NaN or infinite although its gradient was finite.

    ## Why it matters

    The cause is in the write itself. In float16, Adam's `eps=1e-8` is exactly 0, so that a small
    gradient gives 0/0; a guard such as `clamp_min(1e-12)` is 0 as well, and normalising a zero row
    divides by it.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, dtype=torch.float16))
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x * self.scale.float() * torch.tensor([1.0, 1.0, 1.0, 0.0]))

    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def step():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))  # float32: eps is not 0
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x * self.scale * torch.tensor([1.0, 1.0, 1.0, 0.5]))

    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def step():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## When to silence it

    Never.
    """
    for entry in evidence.entries:
        for look in evidence.looks_at(entry):
            if look.value is None or not look.value.nonfinite:
                continue
            if look.gradient is not None and look.gradient.nonfinite:
                break  # the gradient brought it
            phase = next((p for p in BLAMED if _is_bad(look, p)), None)
            if phase is not None:
                dtype = dtype_name(entry.dtype)
                size = f", gradient up to {look.gradient.absmax:.1e}" if look.gradient else ""
                yield Finding(
                    what=f"{BLAMED[phase]} NaN or infinity into a parameter",
                    where=list(entry.names),
                    found=f"{look.value.nonfinite} of {look.value.count} entries of {dtype}{size}",
                    wanted="finite values after a finite gradient",
                    location=_line_of(evidence, phase),
                )
            break


def _is_bad(look: Look, phase: Phase) -> bool:
    change = look.changes.get(phase)
    return change is not None and change.nonfinite > 0


def _line_of(evidence: Evidence, phase: Phase) -> str | None:
    steps = evidence.happened("step")
    return steps[0].location if phase == "step" and steps else None
