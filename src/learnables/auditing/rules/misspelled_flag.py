"""LRN106: what freezes is spelled ``requires_grad`` and set on a Parameter."""

import difflib
from collections.abc import Iterator

from torch import nn

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule

_MEANT = ("requires_grad", "requires_grad_")


@rule("LRN106", needs=Stage.MODEL)
def misspelled_flag(evidence: Evidence) -> Iterator[Finding]:
    """An attribute like ``require_grad`` on a Parameter, or ``requires_grad`` on a module.

    ## Why it matters

    Python creates the attribute and nothing is frozen: what should stay as it is keeps training.

    ## Example

    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    for parameter in model[0].parameters():
        parameter.require_grad = False
    ```

    ## Use instead

    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    for parameter in model[0].parameters():
        parameter.requires_grad = False
    ```

    ## When to silence it

    The attribute belongs to somebody else and means something else.
    """
    for entry in evidence.entries:
        for key, value in vars(entry.param).items():
            if isinstance(value, bool) and value != entry.trainable and _is_near(key):
                yield Finding(
                    what="a misspelled flag freezes nothing",
                    where=list(entry.names),
                    found=f".{key} = {value}, requires_grad = {entry.trainable}",
                    wanted=f"requires_grad = {value}",
                    mend=f"model.get_parameter({entry.name!r}).requires_grad_({value})\n"
                    f"del model.get_parameter({entry.name!r}).{key}",
                )
    for module in dict.fromkeys(place.owner for e in evidence.entries for place in e.places):
        yield from _on_modules(evidence, module)


def _on_modules(evidence: Evidence, module: nn.Module) -> Iterator[Finding]:
    for key, value in vars(module).items():
        if not isinstance(value, bool) or not (key == "requires_grad" or _is_near(key)):
            continue
        wrong = [
            name
            for entry in evidence.entries
            if any(p is entry.param for p in module.parameters()) and entry.trainable != value
            for name in entry.names
        ]
        if wrong:
            yield Finding(
                what="a flag on a module freezes nothing",
                where=wrong,
                found=f".{key} = {value} on a {type(module).__name__}; its parameters differ",
                wanted=f"module.requires_grad_({value})",
            )


def _is_near(key: str) -> bool:
    return key not in _MEANT and bool(difflib.get_close_matches(key, _MEANT, 1, 0.85))
