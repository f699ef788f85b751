"""LRN704: nothing is shared where the author says so."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule


@rule("LRN704", needs=Stage.MODEL)
def shared_without_intent(evidence: Evidence) -> Iterator[Finding]:
    """A Parameter under several names although the declared ties do not have it.

    ## Why it matters

    Sharing by accident, one module assigned twice or a list multiplied, takes capacity away or lets
    a "frozen" copy follow every update.

    ## Example

    ```python
    model = nn.ModuleDict({"online": nn.Linear(4, 4)})
    model["target"] = model["online"]
    intent = ln.Intent(tied=[])
    ```

    ## Use instead

    ```python
    model = nn.ModuleDict({"online": nn.Linear(4, 4), "target": nn.Linear(4, 4)})
    intent = ln.Intent(tied=[])
    ```

    ## When to silence it

    The sharing is meant; add the names to `tied`.
    """
    tied = evidence.intent.tied
    needed(tied is not None or None, "intent=ln.Intent(tied=[…]); [] says that nothing is shared")
    meant = [
        {id(e) for name in group for e in evidence.entries_named(name)} for group in tied or ()
    ]
    for entry in evidence.entries:
        if len(entry.names) > 1 and not any(id(entry) in group for group in meant):
            yield Finding(
                what="a Parameter stands under several names that are not declared as tied",
                where=list(entry.names),
                found=f"1 Parameter under {len(entry.names)} names",
                wanted="a Parameter for each name, or a declared tie",
            )
