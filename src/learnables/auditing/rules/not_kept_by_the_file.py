"""LRN807: what is saved is what is loaded."""

from collections.abc import Iterator

import torch

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, SkipRule, rule


@rule("LRN807", needs=Stage.MODEL)
def not_kept_by_the_file(evidence: Evidence) -> Iterator[Finding]:
    """A value that does not come back when the state dict is loaded into another copy.

    ## Why it matters

    Hooks that rename or shrink what is saved, loaders that skip what they do not know, buffers
    that are not persistent and yet learn: the loaded model is another one, and only its results
    tell. On request: `ln.audit(model, probes=["checkpoint"])` loads the state dict into a copy
    whose values were changed, and compares.

    ## Example

    ```python
    def shrink(module, state, prefix, metadata):
        for key in state:
            state[key] = state[key].half()  # smaller files

    model = nn.Linear(4, 1)
    model.register_state_dict_post_hook(shrink)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    probes = ["checkpoint"]
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    probes = ["checkpoint"]
    ```

    ## When to silence it

    The file is meant to be smaller than the model.

    Raises:
        SkipRule: The probe was not asked for, or the model cannot be copied.
    """
    made = evidence.experiments
    if made.lost is None:
        raise SkipRule(f"needs {made.reasons.get('checkpoint', _ASK)}")
    fixed = {h.name for h in evidence.held_as("buffer") if not _has_changed(evidence, h.tensor)}
    for name, how in made.lost.items():
        if how == "is not in the file" and name in fixed:
            continue  # a constant that the constructor makes again
        yield Finding(
            what="a value is not kept by the state dict",
            where=[name] if name else [],
            found=how,
            wanted="the same value, bit for bit",
        )


_ASK = "to be asked for: probes=['checkpoint']"


def _has_changed(evidence: Evidence, x: torch.Tensor) -> bool:
    first, last = evidence.first.get(x), evidence.last.get(x)
    return first is not None and last is not None and not torch.equal(first, last)
