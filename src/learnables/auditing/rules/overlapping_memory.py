"""LRN601: the elements of a parameter have memory of their own."""

from collections.abc import Iterator

import torch

from learnables._torch import local
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.strides import overlaps_itself


@rule("LRN601", needs=Stage.MODEL, subsumes=("LRN4", "LRN502", "LRN602", "LRN622", "LRN625"))
def overlapping_memory(evidence: Evidence) -> Iterator[Finding]:
    """A parameter several of whose elements are the same memory, as `expand` makes it.

    ## Why it matters

    It claims more elements than it owns. Most optimizers raise when they write to it; the fused
    ones on a CPU write past its end. DDP cannot broadcast what `expand` made; FSDP2 and safetensors
    refuse it.

    ## Example

    ```python
    model = nn.Linear(4, 4)
    model.heads = nn.Parameter(torch.zeros(4).expand(3, 4))
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)
    model.heads = nn.Parameter(torch.zeros(4).expand(3, 4).clone())
    ```

    ## When to silence it

    Never.
    """
    for entry in evidence.entries:
        x = local(entry.param) if evidence.has_shape(entry) else entry.param
        if not evidence.has_shape(entry) or x.layout is not torch.strided or x.is_contiguous():
            continue
        if overlaps_itself(x):
            yield Finding(
                what="elements of a parameter share memory",
                where=list(entry.names),
                found=f"shape {tuple(x.shape)}, strides {tuple(x.stride())}",
                wanted="a place for each element",
                mend=f"model.get_parameter({entry.name!r}).data = "
                f"model.get_parameter({entry.name!r}).data.clone("
                "memory_format=torch.contiguous_format)",
            )
