"""LRN109: what was meant to train trains, what was meant to stay stays."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule


@rule("LRN109", needs=Stage.MODEL, subsumes=("LRN106", "LRN108", "LRN201", "LRN707"))
def not_as_intended(evidence: Evidence) -> Iterator[Finding]:
    """A parameter that trains although it was declared frozen, or the other way round.

    ## Why it matters

    A freezing loop that misses a name, a freeze that comes with a constructor's default, a "frozen"
    copy that is the same object as the one that trains: the loss shows none of it.

    ## Example

    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    intent = ln.Intent(frozen=["0"])
    ```

    ## Use instead

    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    intent = ln.Intent(frozen=["0"])
    ```

    ## When to silence it

    The declared intent is out of date; correct it instead.
    """
    intent = evidence.intent
    needed([*intent.frozen, *intent.trainable], "intent=ln.Intent(frozen=…, trainable=…)")
    for entry in evidence.meant(intent.frozen):
        moved = [look for look in evidence.looks_at(entry) if look.changes]
        if entry.trainable or moved:
            how = (
                f"; moved in {len(moved)} of {evidence.iterations} observed iterations"
                if moved
                else ""
            )
            tied = f"; the same object as {', '.join(entry.names)}" if len(entry.names) > 1 else ""
            yield Finding(
                what="a parameter that is meant to be frozen is not",
                where=list(entry.names),
                found=f"requires_grad = {entry.trainable}{how}{tied}",
                wanted="requires_grad = False and the same value for ever",
                mend=f"model.get_parameter({entry.name!r}).requires_grad_(False)"
                if entry.trainable and not tied
                else "",
            )
    for entry in evidence.meant(intent.trainable):
        if not entry.trainable:
            yield Finding(
                what="a parameter that is meant to train is frozen",
                where=list(entry.names),
                found="requires_grad = False",
                wanted="requires_grad = True, and a place in the optimizer",
            )
