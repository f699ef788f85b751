"""LRN602: what a fused optimizer steps is dense, and its state has the same layout."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from learnables._torch import local
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.strides import has_other_order, is_dense


@rule("LRN602", needs=Stage.OPTIMIZER, subsumes=("LRN4", "LRN620", "LRN622", "LRN625"))
def strided_under_fused(evidence: Evidence) -> Iterator[Finding]:
    """A parameter with gaps between its elements, or a state in another order, under `fused=True`.

    ## Why it matters

    Fused optimizers on a CPU walk the memory of parameter, gradient and state as if it were one
    dense block in one order. A slice of a bigger tensor is then updated in the wrong places, its
    neighbours included; moments saved from a contiguous model and loaded into a channels-last one
    are applied to other elements. The plain and the foreach implementations are right.

    ## Example

    ```python
    model = nn.Linear(4, 4)
    model.prompt = nn.Parameter(torch.zeros(4, 8)[:, :4])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    step = None
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)
    model.prompt = nn.Parameter(torch.zeros(4, 8)[:, :4].contiguous())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    step = None
    ```

    ## When to silence it

    Never; leave `fused` out if the layout has to stay.
    """
    for seen in evidence.optimizers:
        for group in seen.groups:
            if not group.options.get("fused"):
                continue
            for param in group.params:
                entry = evidence.entry_of.get(id(param))
                if entry is None or not evidence.has_shape(entry):
                    continue
                x, state = local(param), seen.optimizer.state.get(param, {})
                if x.layout is not torch.strided or x.device.type != "cpu":
                    continue
                mend = "ln.canonicalize_(model, optimizer, undeclared='dense')"
                if not is_dense(x):
                    found = f"shape {tuple(x.shape)}, strides {tuple(x.stride())}"
                    mend = (
                        f"model.get_parameter({entry.name!r}).data = "
                        f"model.get_parameter({entry.name!r}).data.contiguous()"
                    )
                elif state and (odd := _laid_out_otherwise(state, x)):
                    found = f"strides {tuple(x.stride())}; {odd}"
                else:
                    continue
                yield Finding(
                    what="a fused optimizer steps memory that is not one dense block in one order",
                    where=list(entry.names),
                    found=found,
                    wanted="a contiguous parameter with state of the same strides",
                    mend=mend,
                )


def _laid_out_otherwise(state: Mapping[str, Any], x: Tensor) -> str:
    """The first state of the parameter's shape that lies in another order, and its strides."""
    for key, value in state.items():
        part = local(value) if isinstance(value, Tensor) else None
        if part is not None and part.shape == x.shape and has_other_order(part, x):
            return f"{key} {tuple(part.stride())}"
    return ""
