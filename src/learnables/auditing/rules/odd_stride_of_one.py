"""LRN623: dimensions of size 1 have the strides that torch gives them."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.strides import format_of, usual_strides, wanted_strides


@rule("LRN623", needs=Stage.MODEL, severity="note")
def odd_stride_of_one(evidence: Evidence) -> Iterator[Finding]:
    """A parameter that counts as contiguous although a dimension of size 1 has an odd stride.

    ## Why it matters

    The values are right, and `is_contiguous()` says True, so that `.contiguous()` changes nothing.
    DDP compares the strides themselves: it warns in every step that "grad strides do not match
    bucket view strides", and cannot wrap a module that has no other parameter.

    ## Example

    ```python
    model = nn.Linear(4, 4)
    model.token = nn.Parameter(torch.zeros(4, 1, 1).permute(2, 1, 0))  # strides (1, 1, 1)
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)
    model.token = nn.Parameter(torch.zeros(1, 1, 4))
    ```

    ## When to silence it

    The model never meets DDP.
    """
    for entry in evidence.strided:
        x = entry.param
        if 1 not in x.shape or not x.numel() or tuple(x.stride()) in usual_strides(x.shape):
            continue
        memory_format = format_of(x)
        if memory_format is not None:
            yield Finding(
                severity="warning" if id(x) in evidence.reduced else "note",
                what="a dimension of size 1 has a stride that DDP does not expect",
                where=list(entry.names),
                found=f"shape {tuple(x.shape)}, strides {tuple(x.stride())}",
                wanted=f"strides {wanted_strides(x.shape, memory_format)}",
                mend="ln.canonicalize_(model, optimizer, separate=True)",
            )
