"""LRN720: what declares a constraint is kept in its set by somebody."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.sets.apply import enforcer_of
from learnables.sets.constraint import constraint_of
from learnables.sets.parametrized import is_parametrized


@rule("LRN720", needs=Stage.OPTIMIZER, subsumes=("LRN705",))
def constraint_never_enforced(evidence: Evidence) -> Iterator[Finding]:
    """A parameter that declares a constraint which nothing enforces.

    ## Why it matters

    `ln.parameter(constraint=…)` writes down what is wanted; a group of an optimizer cannot carry it
    out. Without `ln.attach` the first step leaves the set, and no later one comes back.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = ln.parameter(4, 4, constraint=ln.sets.Ball())

        def forward(self, x):
            return x @ self.w

    model = Net()
    optimizer = torch.optim.SGD(ln.param_groups(model, lr=0.1))
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = ln.parameter(4, 4, constraint=ln.sets.Ball())

        def forward(self, x):
            return x @ self.w

    model = Net()
    optimizer = torch.optim.SGD(ln.param_groups(model, lr=0.1))
    ln.attach(model, optimizer)
    ```

    ## When to silence it

    The loop projects by itself, and a penalty or a test sees to it that it does.
    """
    enforcers = [e for seen in evidence.optimizers if (e := enforcer_of(seen.optimizer))]
    enforced = {key for enforcer in enforcers for key in enforcer.attached}
    for entry in evidence.trainable():
        constraint = constraint_of(entry)
        if constraint is None or is_parametrized(entry) or id(entry.param) in enforced:
            continue
        yield Finding(
            what="a declared constraint is enforced by nothing",
            where=list(entry.names),
            found=f"{constraint!r}, and no hook on {len(evidence.optimizers)} optimizers",
            wanted="a projection after each step",
            mend="ln.attach(model, optimizer)",
        )
