"""LRN107: what is to be learned is of a floating dtype."""

from collections.abc import Iterator

import torch
from torch import nn

from learnables._torch import dtype_name
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule

_PACKED = (torch.uint8, torch.int8)  # what quantised weights are stored in


@rule("LRN107", needs=Stage.MODEL, severity="warning")
def integer_parameter(evidence: Evidence) -> Iterator[Finding]:
    """An ``nn.Parameter`` of an integer or boolean dtype.

    ## Why it matters

    Integers cannot ask for a gradient; `requires_grad=False` silences the error and the values
    never train. A constant belongs into a buffer, a value to learn into a floating dtype.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.levels = nn.Parameter(torch.tensor([1, 2, 3, 4]), requires_grad=False)

    model = Net()
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.levels = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))

    model = Net()
    ```

    ## When to silence it

    The Parameter stores packed weights of another format.
    """
    for entry in evidence.entries:
        p = entry.param
        if p.is_floating_point() or p.is_complex() or p.dtype in _PACKED:
            continue
        if type(p) is nn.Parameter:
            yield Finding(
                what="a Parameter of an integer dtype can never train",
                where=list(entry.names),
                found=dtype_name(p.dtype),
                wanted="a floating dtype, or a buffer",
            )
