"""LRN108: what is frozen holds something worth keeping."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.places import library_of
from learnables.auditing.rule import Finding, rule
from learnables.entries import Entry


@rule("LRN108", needs=Stage.BACKWARD, severity="warning")
def frozen_at_zero(evidence: Evidence) -> Iterator[Finding]:
    """A hand-written Parameter that is frozen while it is still all zeros.

    ## Why it matters

    A loop that freezes "everything pretrained" also catches the prompt or the gate that was added
    before it ran. All zeros is where such a parameter starts, not what a training left behind, so
    nothing is kept by freezing it, and the only part that should train does not.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
            self.prompt = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return self.head(self.backbone(x + self.prompt).relu())

    model = Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
            self.prompt = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return self.head(self.backbone(x + self.prompt).relu())

    model = Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head") or name == "prompt")
    optimizer = torch.optim.SGD([*model.head.parameters(), model.prompt], lr=0.1)
    ```

    ## When to silence it

    It is a constant; a buffer says so.
    """
    declared = {id(e) for e in evidence.meant(evidence.intent.frozen)}
    for entry in evidence.entries:
        if entry.trainable or id(entry) in declared or not _is_hand_written(entry):
            continue
        first = evidence.first.get(entry.param)
        used = any(look.used for look in evidence.looks_at(entry))
        if used and first is not None and first.numel() and not bool(first.any()):
            yield Finding(
                what="a hand-written Parameter is frozen while it is all zeros",
                where=list(entry.names),
                found=f"requires_grad = False, {entry.looks}, every entry 0",
                wanted="requires_grad = True, or a buffer",
                severity="note" if evidence.library_of(entry) else None,
            )


def _is_hand_written(entry: Entry) -> bool:
    """Declared by a module that is none of torch's layers, whose biases start at zero."""
    return library_of(type(entry.owner)) is None and entry.param.is_floating_point()
