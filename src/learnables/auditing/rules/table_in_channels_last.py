"""LRN624: only what a convolution reads is laid out channels last."""

from collections.abc import Iterator

from learnables._torch import is_convolution
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.runtime.layout import declared_layout
from learnables.strides import format_of, wanted_strides


@rule("LRN624", needs=Stage.MODEL, severity="note")
def table_in_channels_last(evidence: Evidence) -> Iterator[Finding]:
    """A table of positions or blocks that `model.to(memory_format=torch.channels_last)` laid out.

    ## Why it matters

    The call changes the strides of *every* parameter with four dimensions, not of convolutions
    only. A table is then cut by `flatten(2)` and `view` in another order than it lies in: they
    copy, or fail. FSDP2 and safetensors refuse it. The values stay right.

    ## Example

    ```python
    model = nn.Sequential(nn.Conv2d(3, 8, 4))
    model.positions = nn.Parameter(torch.zeros(1, 8, 7, 7))
    model = model.to(memory_format=torch.channels_last)
    ```

    ## Use instead

    ```python
    model = nn.Sequential(nn.Conv2d(3, 8, 4))
    model.positions = ln.parameter(
        torch.zeros(1, 8, 7, 7), memory_format=torch.contiguous_format
    )
    model = model.to(memory_format=torch.channels_last)  # positions stay as declared
    ```

    ## When to silence it

    The table is added to images that lie channels last, where it saves a copy; better declare that:
    `ln.annotate(model, "positions", memory_format=torch.channels_last)`. A kernel of your own that
    a convolution reads is declared the same way, or by `role="conv"`.
    """
    for entry in evidence.not_contiguous:
        x = entry.param
        owned = any(is_convolution(p.owner) or p.note.get("role") == "conv" for p in entry.places)
        if not owned and declared_layout(entry) is None and format_of(x) is not None:
            keep = f"ln.annotate(model, {entry.name!r}, memory_format=torch.contiguous_format)"
            yield Finding(
                what="a parameter of no convolution is laid out channels last",
                where=list(entry.names),
                found=f"shape {tuple(x.shape)}, strides {tuple(x.stride())}; FSDP2 and safetensors "
                "refuse it",
                wanted=f"strides {wanted_strides(x.shape)}",
                mend=keep,
            )
