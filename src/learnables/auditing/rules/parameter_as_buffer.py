"""LRN103: a buffer does not ask for a gradient."""

from collections.abc import Iterator

from torch import nn

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN103", needs=Stage.MODEL)
def parameter_as_buffer(evidence: Evidence) -> Iterator[Finding]:
    """A registered buffer that is a Parameter or asks for a gradient.

    ## Why it matters

    `register_buffer` accepts an `nn.Parameter` in silence. It looks like one and receives
    gradients, but `parameters()` never lists it, so no optimizer gets it.

    ## Example

    ```python
    model = nn.Linear(4, 1)
    model.register_buffer("scale", nn.Parameter(torch.ones(4)))
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    model.register_parameter("scale", nn.Parameter(torch.ones(4)))
    ```

    ## When to silence it

    The gradient with respect to the buffer is wanted, and nothing is to be learned from it.
    """
    for held in evidence.held_as("buffer"):
        x = held.tensor
        if x.requires_grad and x.is_leaf and not evidence.groups_of(held):
            kind = "nn.Parameter" if isinstance(x, nn.Parameter) else "tensor with requires_grad"
            yield Finding(
                what="a buffer asks for a gradient",
                where=[held.name],
                found=f"{kind} of shape {tuple(x.shape)} among the buffers",
                wanted="register_parameter, or a plain tensor",
            )
