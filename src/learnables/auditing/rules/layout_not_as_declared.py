"""LRN625: a parameter has the layout that was declared for it."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.runtime.layout import declared_layout
from learnables.strides import wanted_strides


@rule("LRN625", needs=Stage.MODEL, severity="warning")
def layout_not_as_declared(evidence: Evidence) -> Iterator[Finding]:
    """A parameter whose strides are not those of its declared `memory_format`.

    ## Why it matters

    Somebody measured that the layout matters here and declared it. What keeps it through `.to()`,
    loading and copies does not see code that assigns `.data`, or that puts another Parameter in
    the place of the declared one.

    ## Example

    ```python
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = ln.parameter(8, 3, 4, 4, memory_format=torch.channels_last)

    model = Stem()
    model.kernel.data = torch.randn(8, 3, 4, 4)
    ```

    ## Use instead

    ```python
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = ln.parameter(8, 3, 4, 4, memory_format=torch.channels_last)

    model = Stem()
    with torch.no_grad():
        model.kernel.copy_(torch.randn(8, 3, 4, 4))
    ```

    ## When to silence it

    The declaration is about another machine; better declare it there.
    """
    for entry in evidence.strided:
        declared = declared_layout(entry)
        if declared is None:
            continue
        x = entry.param
        wanted = wanted_strides(x.shape, declared)
        if x.numel() and tuple(x.stride()) != wanted:
            yield Finding(
                what="a parameter is not laid out as declared",
                where=list(entry.names),
                found=f"shape {tuple(x.shape)}, strides {tuple(x.stride())}",
                wanted=f"strides {wanted}, {declared}",
                mend="ln.canonicalize_(model, optimizer, undeclared='dense', separate=True)",
            )
