"""LRN301: a gradient arrives at every trainable parameter."""

import math
from collections.abc import Iterator, Sequence

from learnables.auditing.evidence import Ending, Evidence, Look, Stage
from learnables.auditing.rule import Finding, rule
from learnables.entries import Entry


@rule("LRN301", needs=Stage.BACKWARD, subsumes=("LRN302", "LRN4"))
def no_gradient(evidence: Evidence) -> Iterator[Finding]:
    """A trainable parameter that no backward gives a gradient.

    ## Why it matters

    It never learns, whatever the loss does. Either its path to the loss is cut (`.data`,
    `.detach()`, `.item()`, `torch.tensor(p)`, `no_grad`, a comparison, rounding, a custom function
    that returns None), or its result is thrown away, or it is never used. The finding says which,
    and at which line.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x * self.scale.data)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x * self.scale)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## When to silence it

    The parameter is used only for some batches, and none of the observed ones was one of them.
    """
    for entry in evidence.trainable():
        looks = evidence.looks_at(entry)
        if not looks or any(look.arrived for look in looks) or _is_given_by_hand(looks):
            continue
        if evidence.is_found(entry) or _is_moved_by_hand(evidence, entry):
            continue
        ending = evidence.endings.get(entry)
        yield Finding(
            what="no gradient arrives at a trainable parameter",
            where=list(entry.names),
            found=f"gradient None in {evidence.n_of_n}; {in_words(ending)}"
            f"{_influence(evidence, entry)}",
            wanted="a gradient in at least one of them",
            location=ending.location if ending else None,
        )


def _is_given_by_hand(looks: Sequence[Look]) -> bool:
    """``.grad`` is filled from ``torch.autograd.grad`` or ``torch.func.grad``."""
    return any(look.stepped and look.gradient is not None for look in looks)


def _is_moved_by_hand(evidence: Evidence, entry: Entry) -> bool:
    """An average or a code book: nothing reaches it, and the loop rewrites it outside the step."""
    looks = evidence.looks_at(entry)
    rewritten = any(set(look.changes) - {"step"} for look in looks)
    return rewritten and not evidence.groups_of(entry)


def _influence(evidence: Evidence, entry: Entry) -> str:
    """Whether the loss depends on it, where that was tried."""
    slope = (evidence.experiments.slopes or {}).get(entry.param)
    if slope is None:
        return ""
    if math.isnan(slope.numeric):
        return "; the loss does not depend on it"
    return f"; the loss depends on it all the same: it changes by {slope.numeric:.2g} along it"


def in_words(ending: Ending | None) -> str:
    """Where a path ends, as half a sentence."""
    if ending is None:
        return "in no graph that backward was called on"
    return {
        "cut": f"{ending.op} makes a copy without graph",
        "dropped": f"the result of {ending.op} is not used",
        "unused": "it enters no computation",
        "stale": "the graph was built in an earlier iteration",
        "silent": f"it is in the graph, but {ending.op} gives no gradient back",
    }[ending.kind]
