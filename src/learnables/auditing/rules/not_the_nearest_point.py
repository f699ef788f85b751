"""LRN706: the correction after a step is a projection onto the declared set."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule
from learnables.auditing.rules.outside_its_set import constraints, tolerance, violation


@rule("LRN706", needs=Stage.STEP, severity="warning")
def not_the_nearest_point(evidence: Evidence) -> Iterator[Finding]:
    """A value inside its set is moved further by the correction than the step had moved it.

    ## Why it matters

    A point inside a set is at most as far from the set after a step as the step is long, so a
    projection never has to move it further than that. One that does enforces another set: dividing
    by the norm is a sphere, not a ball, and blows short rows up to length 1 at every step.

    ## Example

    ```python
    model = nn.Module()
    model.w = nn.Parameter(torch.full((1, 4), 0.1))
    optimizer = torch.optim.SGD([model.w], lr=0.1)
    intent = ln.Intent(constraints={"w": ln.sets.Ball()})

    def step():
        optimizer.zero_grad()
        loss = (model.w - 0.2).square().sum()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.w.div_(model.w.norm(dim=1, keepdim=True).clamp_min(1e-12))
        return loss
    ```

    ## Use instead

    ```python
    model = nn.Module()
    model.w = nn.Parameter(torch.full((1, 4), 0.1))
    optimizer = torch.optim.SGD([model.w], lr=0.1)
    intent = ln.Intent(constraints={"w": ln.sets.Ball()})

    def step():
        optimizer.zero_grad()
        loss = (model.w - 0.2).square().sum()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.w.div_(model.w.norm(dim=1, keepdim=True).clamp_min(1.0))
        return loss
    ```

    ## When to silence it

    The correction is meant to do more than project.
    """
    what = "a declared constraint, or intent=ln.Intent(constraints={…})"
    constrained = needed(list(constraints(evidence)), what)
    for entry, chosen in constrained:
        first = evidence.first.get(entry.param)
        looks = evidence.looks_at(entry)
        if first is None or not looks or violation(chosen, first) > tolerance(first):
            continue
        stepped, corrected = looks[0].changes.get("step"), looks[0].changes.get("after")
        if stepped and corrected and corrected.norm > 2 * stepped.norm + tolerance(first):
            yield Finding(
                what="what runs after the step does not project onto the declared set",
                where=list(entry.names),
                found=f"the step moved a point of {chosen!r} by {stepped.norm:.2g}, "
                f"the correction by {corrected.norm:.2g}",
                wanted="a correction that is no longer than the step",
            )
