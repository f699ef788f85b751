"""LRN620: the elements of a parameter fill one block of memory."""

from collections.abc import Iterator

import torch

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.strides import is_dense, overlaps_itself


@rule("LRN620", needs=Stage.MODEL, severity="warning", subsumes=("LRN625",))
def gaps_between_elements(evidence: Evidence) -> Iterator[Finding]:
    """A parameter that is a slice of a bigger tensor, with gaps between its elements.

    ## Why it matters

    The whole bigger tensor stays in memory. FSDP2 and safetensors refuse the parameter,
    `parameters_to_vector` fails on most of its kind, and the day somebody passes `fused=True` to an
    optimizer on a CPU, it updates the neighbours instead (LRN602).

    ## Example

    ```python
    model = nn.Linear(4, 4)
    model.even = nn.Parameter(torch.zeros(4, 8)[:, ::2])
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)
    model.even = nn.Parameter(torch.zeros(4, 8)[:, ::2].contiguous())
    ```

    ## When to silence it

    The bigger tensor is used too, and is meant to change with the parameter.
    """
    for entry in evidence.not_contiguous:
        x = entry.param
        if not is_dense(x) and not overlaps_itself(x):
            block = torch.empty(x.shape, device="meta").stride()
            yield Finding(
                what="there are gaps between the elements of a parameter",
                where=list(entry.names),
                found=f"shape {tuple(x.shape)}, strides {tuple(x.stride())}; FSDP2 and safetensors "
                "refuse it",
                wanted=f"strides {block}, or those of another dense layout",
                mend="ln.canonicalize_(model, optimizer, undeclared='dense', separate=True)",
            )
