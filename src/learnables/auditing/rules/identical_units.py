"""LRN502: the units of a layer differ."""

from collections.abc import Iterator

import torch
from torch import Tensor

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN502", needs=Stage.STEP, severity="warning")
def identical_units(evidence: Evidence) -> Iterator[Finding]:
    """A matrix whose rows start equal, train, and stay equal.

    ## Why it matters

    Units that start with the same weights get the same gradient for ever: eight of them behave as
    one. Nothing shows it, because the one unit does learn.

    ## Example

    ```python
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## Use instead

    ```python
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    ## When to silence it

    The rows are meant to be one vector; a parameter of one row says so better.
    """
    for entry in evidence.trainable():
        first, last = evidence.first.get(entry.param), evidence.last.get(entry.param)
        if first is None or last is None or not first.is_floating_point():
            continue
        moved = any("step" in look.changes for look in evidence.looks_at(entry))
        if moved and _rows(first) > 1 and _all_equal(first) and _all_equal(last):
            yield Finding(
                what="all units of a layer are identical and stay so",
                where=list(entry.names),
                found=f"{_rows(first)} equal rows before and after {evidence.n_of_n}",
                wanted="rows that start different",
                mend=f"nn.init.trunc_normal_(model.get_parameter({entry.name!r}), std=0.02)",
            )


def _matrix(x: Tensor) -> Tensor:
    while x.ndim > 2 and x.shape[0] == 1:  # (1, N, D): N rows
        x = x[0]
    return x.flatten(1) if x.ndim >= 2 else x[None]


def _rows(x: Tensor) -> int:
    return len(_matrix(x))


def _all_equal(x: Tensor) -> bool:
    """Up to what the order of summation in a matrix product does to equal rows."""
    rows = _matrix(x).float()
    return bool(torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-6, atol=1e-12))
