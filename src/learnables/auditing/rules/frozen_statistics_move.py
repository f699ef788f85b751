"""LRN711: the running statistics of what is frozen stay as they are."""

from collections.abc import Iterator

from torch import nn

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.intent import means
from learnables.auditing.rule import Finding, rule


@rule("LRN711", needs=Stage.STEP, severity="note")
def frozen_statistics_move(evidence: Evidence) -> Iterator[Finding]:
    """A frozen norm in training mode, whose running mean and variance follow every batch.

    ## Why it matters

    `requires_grad_(False)` stops the optimizer, not the forward: in training mode a BatchNorm
    normalises by the batch and moves its running statistics toward it. The frozen part computes
    something else after each step, in evaluation other than in training, and the change is in the
    checkpoint but in no delta file. A note, since some mean it; a warning where
    `ln.Intent(frozen=…)` names the module.

    ## Example

    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model[:2].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    ```

    ## Use instead

    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    ln.train_only(model, "2.*")
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    ```

    `ln.train_only` and `ln.freeze` keep such modules in evaluation mode whatever `model.train()`
    says.

    ## When to silence it

    The statistics are meant to adapt to the new data.
    """
    declared = evidence.intent.frozen
    roots = {"": evidence.model, **evidence.modules}
    for prefix, root in roots.items():
        for path, module in root.named_modules():
            moves = module.training and getattr(module, "momentum", 0.1) != 0.0
            if not moves or getattr(module, "running_mean", None) is None:
                continue
            around = _params_around(root, path)
            if around and all(_frozen(evidence, p) for p in around):
                name = ".".join(part for part in (prefix, path, "running_mean") if part)
                yield Finding(
                    what="the statistics of a frozen norm move with every batch",
                    where=[name],
                    found=f"{type(module).__name__} in training mode, no parameter of it trains",
                    wanted="evaluation mode, where running_mean and running_var stay as they are",
                    mend=_mend(module, path) if root is evidence.model else "",
                    severity="warning" if any(means(p, name) for p in declared) else None,
                )


def _mend(module: nn.Module, path: str) -> str:
    owns = path and next(module.parameters(), None) is not None
    return f'ln.freeze(model, "{path}.*")' if owns else ""


def _params_around(root: nn.Module, path: str) -> list[nn.Parameter]:
    """Parameters of the module at ``path``, or of the first one around it that has any."""
    parts = path.split(".") if path else []
    for depth in range(len(parts), -1, -1):
        params = list(root.get_submodule(".".join(parts[:depth])).parameters())
        if params:
            return params
    return []


def _frozen(evidence: Evidence, param: nn.Parameter) -> bool:
    """Whether it trains at no time; of two networks in turns, one is switched off for a while."""
    if param.requires_grad:
        return False
    entry = evidence.entry_of[id(param)]
    if evidence.ever(entry, "arrived"):
        return False
    return evidence.ever(entry, "stepped") or not evidence.groups_of(entry)
