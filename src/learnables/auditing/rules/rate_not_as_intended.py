"""LRN205: learning rates stand to each other as they were meant to."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule
from learnables.entries import Entry


@rule("LRN205", needs=Stage.OPTIMIZER)
def rate_not_as_intended(evidence: Evidence) -> Iterator[Finding]:
    """Learning rates whose ratios are not the declared ones.

    ## Why it matters

    A scheduler that takes one number, `OneCycleLR(max_lr=0.1)`, applies it to all groups: the rate
    that was chosen for the prompt is gone from the first step. A checkpoint of the optimizer
    brings its own rates too. The ratios are compared, so that a schedule may scale all of them.

    ## Example

    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    groups = [
        {"params": model[0].parameters(), "lr": 0.001},
        {"params": model[1].parameters(), "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.001, total_steps=50)
    intent = ln.Intent(lr={"0": 0.001, "1": 0.1})
    ```

    ## Use instead

    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    groups = [
        {"params": model[0].parameters(), "lr": 0.001},
        {"params": model[1].parameters(), "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=50)
    intent = ln.Intent(lr={"0": 0.001, "1": 0.1})
    ```

    ## When to silence it

    The ratios change over time on purpose.
    """
    wanted = needed(_declared(evidence), "intent=ln.Intent(lr=…) or ln.parameter(lr_scale=…)")
    actual = {e: rate for e in wanted if (rate := _rate(evidence, e)) and wanted[e]}
    if len(actual) < 2:
        return
    factors = {entry: actual[entry] / wanted[entry] for entry in actual}
    usual = sorted(factors.values())[len(factors) // 2]
    if max(factors.values()) <= 1.01 * min(factors.values()):
        return
    half = sum(abs(f - usual) <= 0.01 * usual for f in factors.values()) * 2 <= len(factors)
    off = [e for e, factor in factors.items() if half or abs(factor - usual) > 0.01 * usual]
    seen = [f"{e.name} {actual[e]:.3g} (declared {wanted[e]:.3g})" for e in off]
    yield Finding(
        what="learning rates do not stand to each other as declared",
        where=[name for entry in off for name in entry.names],
        found=", ".join(seen),
        wanted="one factor between actual and declared rate for all",
    )


def _declared(evidence: Evidence) -> dict[Entry, float]:
    rates = dict.fromkeys(evidence.entries, 0.0)
    for pattern, rate in evidence.intent.lr.items():
        for entry in evidence.entries_named(pattern):
            rates[entry] = float(rate)
    return {entry: rate for entry, rate in rates.items() if rate and entry.trainable}


def _rate(evidence: Evidence, entry: Entry) -> float | None:
    stepped = [look.lr for look in evidence.looks_at(entry) if look.lr]
    if stepped:
        return stepped[-1]
    groups = evidence.groups_of(entry)
    return float(groups[0].options["lr"]) if len(groups) == 1 else None
