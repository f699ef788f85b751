"""LRN804: a copy of the weights has a value for each of them."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule
from learnables.auditing.rules.copy_is_an_alias import tensors_of
from learnables.auditing.rules.not_restored import counterpart


@rule("LRN804", needs=Stage.MODEL)
def copy_matches_no_name(evidence: Evidence) -> Iterator[Finding]:
    """A trainable parameter that an EMA or a snapshot has no value for, or one of another shape.

    ## Why it matters

    An EMA that was made before the model was wrapped, compiled or extended looks its parameters up
    by names that no longer exist. What it does not find it does not average, and evaluation mixes
    new weights with old ones.

    ## Example

    ```python
    import copy

    model = nn.Linear(4, 4)
    copies = {"ema": copy.deepcopy(model.state_dict())}
    model.prompt = nn.Parameter(torch.zeros(4))
    ```

    ## Use instead

    ```python
    import copy

    model = nn.Linear(4, 4)
    model.prompt = nn.Parameter(torch.zeros(4))
    copies = {"ema": copy.deepcopy(model.state_dict())}
    ```

    ## When to silence it

    The copy is meant to hold a part of the model.
    """
    for name, copied in needed(evidence.copies, "copies={name: state dict or module}").items():
        held = tensors_of(copied)
        for entry in evidence.entries_of_model():
            if not entry.trainable or not evidence.has_shape(entry):
                continue
            key = counterpart(entry, held)
            if key is None or held[key].shape != entry.shape:
                shape = "no value" if key is None else f"shape {tuple(held[key].shape)}"
                yield Finding(
                    what="a copy of the model does not cover a trainable parameter",
                    where=list(entry.names),
                    found=f"{shape} in {name}, which holds {len(held)} tensors",
                    wanted=f"shape {tuple(entry.shape)}",
                )
