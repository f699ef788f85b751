"""LRN707: a target network is a network of its own."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN707", needs=Stage.STEP, severity="warning")
def target_is_online(evidence: Evidence) -> Iterator[Finding]:
    """One module under two names, called both with and without gradients in training.

    ## Why it matters

    `self.target = self.online` makes no copy. The target that is meant to stand still follows every
    update, and what was stable by construction no longer is.

    ## Example

    ```python
    model = nn.ModuleDict({"online": nn.Linear(4, 1)})
    model["target"] = model["online"]
    optimizer = torch.optim.SGD(model["online"].parameters(), lr=0.1)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def step():
        optimizer.zero_grad()
        with torch.no_grad():
            goal = 1 + 0.9 * model["target"](x)
        loss = (model["online"](x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## Use instead

    ```python
    import copy

    model = nn.ModuleDict({"online": nn.Linear(4, 1)})
    model["target"] = copy.deepcopy(model["online"]).requires_grad_(False)
    optimizer = torch.optim.SGD(model["online"].parameters(), lr=0.1)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def step():
        optimizer.zero_grad()
        with torch.no_grad():
            goal = 1 + 0.9 * model["target"](x)
        loss = (model["online"](x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## When to silence it

    The two names are meant to be one network.
    """
    names: dict[int, set[str]] = {}
    for entry in evidence.trainable():
        for place in entry.places:
            names.setdefault(id(place.owner), set()).add(place.name.rpartition(".")[0])
    for entry in evidence.trainable():
        called = evidence.called.get(id(entry.owner), set())
        modes = {enabled for enabled, training in called if training}
        heads = {name.rpartition(".")[0] or name for name in names[id(entry.owner)]}
        if modes == {True, False} and len(names[id(entry.owner)]) > 1 and not _in_list(heads):
            yield Finding(
                what="one module under two names is called with and without gradients",
                where=list(entry.names),
                found=f"{' and '.join(sorted(names[id(entry.owner)]))} are one "
                f"{type(entry.owner).__name__}",
                wanted="a copy for what is called without gradients",
            )


def _in_list(names: set[str]) -> bool:
    """Items of one list: that is a repeated layer, which another rule is about."""
    return len(names) == 1 and next(iter(names)).rpartition(".")[2].isdigit()
