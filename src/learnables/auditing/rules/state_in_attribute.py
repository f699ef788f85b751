"""LRN111: state that is learned by rule is a buffer."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Held, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN111", needs=Stage.BACKWARD, severity="warning")
def state_in_attribute(evidence: Evidence) -> Iterator[Finding]:
    """A plain tensor that one iteration writes and the next one reads.

    ## Why it matters

    A running centre, a code book or a memory bank in a plain attribute follows neither `.to()` nor
    `state_dict()`: a resumed run starts from its first value, and evaluation of a loaded model
    gives other results.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.center = torch.zeros(4)
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            self.center = 0.9 * self.center + 0.1 * x.detach().mean(0)
            return self.fc(x - self.center)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("center", torch.zeros(4))
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            self.center = 0.9 * self.center + 0.1 * x.detach().mean(0)
            return self.fc(x - self.center)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## When to silence it

    The state is meant to be forgotten between runs, e.g. the hidden state of a recurrence.
    """
    for held in evidence.held_as("attribute"):
        looks = evidence.looks_at(held)
        if held.tensor.requires_grad or not held.tensor.is_floating_point() or not looks:
            continue
        carried = [look for look in looks if look.used and look.changes]
        if len(carried) < 2 or len(carried) < len(looks) - 1:
            continue
        yield Finding(
            what="state that training changes is not in the state dict",
            where=[held.name],
            found=f"a plain attribute of shape {tuple(held.tensor.shape)}, read and changed in "
            f"{len(carried)} of {len(looks)} observed iterations",
            wanted=f"register_buffer({held.name.rpartition('.')[2]!r}, …)",
            severity="note" if _belongs_to_a_batch(evidence, held) else None,
        )


def _belongs_to_a_batch(evidence: Evidence, held: Held) -> bool:
    """One entry per sample, like the hidden state of a recurrence: nobody wants it saved."""
    return evidence.batch_size is not None and evidence.batch_size in held.tensor.shape[:2]
