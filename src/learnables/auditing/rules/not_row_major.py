"""LRN621: a parameter without a declared layout is stored row by row."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.runtime.layout import declared_layout
from learnables.strides import format_of, is_dense, wanted_strides


@rule("LRN621", needs=Stage.MODEL, severity="note")
def not_row_major(evidence: Evidence) -> Iterator[Finding]:
    """A parameter whose dimensions lie in another order, as `.t()` and `.permute` leave them.

    ## Why it matters

    Training is right, and on most machines as fast (`learnables bench layout` measures yours). But
    FSDP2 and safetensors refuse the parameter, `parameters_to_vector` and `view(-1)` fail on it,
    `vector_to_parameters` silently changes its strides, and optimizer state loaded from a
    row-major model is applied to other elements under `fused=True` (LRN602).

    ## Example

    ```python
    model = nn.Linear(4, 4)
    model.mix = nn.Parameter(torch.eye(4, 6).t())
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)
    model.mix = nn.Parameter(torch.eye(4, 6).t().contiguous())
    ```

    ## When to silence it

    A kernel of yours wants this order. Weights of convolutions in `channels_last` are not
    reported.
    """
    for entry in evidence.not_contiguous:
        x = entry.param
        if declared_layout(entry) is None and format_of(x) is None and is_dense(x):
            yield Finding(
                what="the dimensions of a parameter lie in memory in another order",
                where=list(entry.names),
                found=f"shape {tuple(x.shape)}, strides {tuple(x.stride())}; FSDP2 and safetensors "
                "refuse it",
                wanted=f"strides {wanted_strides(x.shape)}",
                mend="ln.canonicalize_(model, optimizer, separate=True)",
            )
