"""LRN101: what is to be learned is registered."""

from collections.abc import Iterator

from torch import nn

from learnables.auditing.evidence import Evidence, Held, Stage
from learnables.auditing.rule import Finding, Severity, rule


@rule("LRN101", needs=Stage.MODEL, subsumes=("LRN102", "LRN111"))
def unregistered_parameter(evidence: Evidence) -> Iterator[Finding]:
    """A tensor that asks for a gradient and that no module registers.

    ## Why it matters

    `parameters()` does not list it: the optimizer does not get it, `state_dict()` does not save it,
    `.to()` does not move it. It does receive a gradient, so a check of gradients looks fine. It
    happens with `requires_grad=True` on a plain tensor, with Parameters in a list, tuple, dict or
    an object that is no module, and with a module kept in a list.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales = [nn.Parameter(torch.ones(4)) for _ in range(2)]
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x * self.scales[0] * self.scales[1])

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales = nn.ParameterList(nn.Parameter(torch.ones(4)) for _ in range(2))
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x * self.scales[0] * self.scales[1])

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## When to silence it

    It is hidden on purpose, e.g. a teacher that nothing trains; freezing it says the same.
    """
    for held in evidence.held_as("attribute", "hidden module", "closure"):
        severity = _how_bad(evidence, held)
        if severity is not None:
            groups = len(evidence.groups_of(held))
            yield Finding(
                what="a tensor that is to be learned is not registered",
                where=[held.name],
                found=f"{_looks(held)}, requires_grad, in 0 modules, in {groups} optimizer groups",
                wanted="nn.Parameter assigned to a module, nn.ParameterList, nn.ParameterDict"
                if held.kind != "hidden module"
                else "the module assigned to a module, nn.ModuleList, nn.ModuleDict",
                severity=severity,
            )


def _how_bad(evidence: Evidence, held: Held) -> Severity | None:
    x = held.tensor
    if not (x.requires_grad and x.is_leaf):
        return None
    optimized = bool(evidence.groups_of(held))
    reached = any(look.reached for look in evidence.looks_at(held))
    observed = bool(evidence.looks_at(held))
    if held.kind == "closure":  # of `step` itself: inputs and functional parameters live there
        return "error" if isinstance(x, nn.Parameter) and reached and not optimized else None
    if held.kind == "hidden module" and observed and not reached and not optimized:
        return "note"
    return "warning" if optimized else "error"


def _looks(held: Held) -> str:
    x = held.tensor
    return f"{type(x).__name__} of shape {tuple(x.shape)}"
