"""LRN708: a copy has memory of its own."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from learnables._torch import storage_key
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule


@rule("LRN708", needs=Stage.MODEL)
def copy_is_an_alias(evidence: Evidence) -> Iterator[Finding]:
    """An EMA, a snapshot or a "best" state that shares memory with the model.

    ## Why it matters

    `model.state_dict()` returns references, and `.copy()` of the dict copies the dict only. The
    best state that is restored at the end is the last one.

    ## Example

    ```python
    model = nn.Linear(4, 4)
    copies = {"best": model.state_dict()}
    ```

    ## Use instead

    ```python
    import copy

    model = nn.Linear(4, 4)
    copies = {"best": copy.deepcopy(model.state_dict())}
    ```

    ## When to silence it

    The copy is meant to follow the model.
    """
    needed(evidence.copies, "copies={name: state dict or module}")
    home = {
        entry.storage: entry
        for entry in evidence.entries
        if evidence.has_shape(entry)
        and entry.param.device.type != "meta"
        and not evidence.is_found(entry)  # by itself, in the loop: that may be the copy
    }
    for name, copied in evidence.copies.items():
        for key, tensor in tensors_of(copied).items():
            entry = home.get(storage_key(tensor)) if tensor.device.type != "meta" else None
            if entry is not None:
                yield Finding(
                    what="a copy of a parameter shares its memory",
                    where=list(entry.names),
                    found=f"{name}[{key!r}] lies in the memory of {entry.name}",
                    wanted="memory of its own: copy.deepcopy(model.state_dict())",
                )


def tensors_of(copied: Any) -> dict[str, Tensor]:
    """Name → tensor of a state dict or a module."""
    if isinstance(copied, nn.Module):
        copied = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
    if not isinstance(copied, Mapping):
        return {}
    return {str(k): v for k, v in copied.items() if isinstance(v, Tensor)}
