"""LRN602: what a fused optimizer steps is dense, and its state has the same layout."""

from collections.abc import Iterator

from torch import Tensor

from learnables._torch import local
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN602", needs=Stage.OPTIMIZER, subsumes=("LRN4",))
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
                if entry is None or param.device.type != "cpu" or not evidence.has_shape(entry):
                    continue
                x = local(param)
                state = seen.optimizer.state.get(param, {})
                others = {k: v for k, v in state.items() if isinstance(v, Tensor)}
                if not _is_dense(x):
                    found = f"shape {tuple(x.shape)}, strides {tuple(x.stride())}"
                elif odd := [k for k, v in others.items() if _ordered_otherwise(local(v), x)]:
                    found = (
                        f"strides {tuple(x.stride())}; {odd[0]} {tuple(others[odd[0]].stride())}"
                    )
                else:
                    continue
                yield Finding(
                    what="a fused optimizer steps memory that is not one dense block in one order",
                    where=list(entry.names),
                    found=found,
                    wanted="a contiguous parameter with state of the same strides",
                    mend=f"model.get_parameter({entry.name!r}).data = "
                    f"model.get_parameter({entry.name!r}).data.contiguous()"
                    if not _is_dense(x)
                    else "",
                )


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill one block without gaps, in any order of dimensions."""
    spread = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.numel() == 0 or spread + 1 == x.numel()


def _ordered_otherwise(state: Tensor, x: Tensor) -> bool:
    if state.shape != x.shape:
        return False
    pairs = zip(x.shape, state.stride(), x.stride(), strict=True)
    return any(size > 1 and a != b for size, a, b in pairs)
