"""LRN701: two Parameters do not lie in the same memory."""

from collections.abc import Iterator

from learnables._torch import local
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.entries import Entry


@rule("LRN701", needs=Stage.MODEL, subsumes=("LRN4", "LRN703"))
def shared_memory(evidence: Evidence) -> Iterator[Finding]:
    """Two Parameters that are different objects over the same memory.

    ## Why it matters

    `nn.Parameter(t)` does not copy `t`. Parameters made from one tensor look separate, have
    separate gradients and optimizer state, and every update of one writes into all of them.

    ## Example

    ```python
    init = torch.ones(4)
    model = nn.ParameterList(nn.Parameter(init) for _ in range(3))
    ```

    ## Use instead

    ```python
    init = torch.ones(4)
    model = nn.ParameterList(nn.Parameter(init.clone()) for _ in range(3))
    ```

    ## When to silence it

    They are views that one of them alone writes to; `ln.tie` or one Parameter says it better.
    """
    by_storage: dict[object, list[tuple[int, int, Entry]]] = {}
    for entry in evidence.entries:
        x = local(entry.param)
        if not evidence.has_shape(entry) or x.device.type == "meta" or not x.numel():
            continue
        if str(x.layout) != "torch.strided":
            continue
        spread = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        start = int(x.storage_offset()) * x.element_size()
        end = start + (spread + 1) * x.element_size()
        by_storage.setdefault(entry.storage, []).append((start, end, entry))
    for spans in by_storage.values():
        together = [
            entry
            for start, end, entry in spans
            if any(o is not entry and start < stop and begin < end for begin, stop, o in spans)
        ]
        if len(together) > 1 and any(entry.trainable for entry in together):
            yield Finding(
                what="Parameters that are different objects share memory",
                where=[name for entry in together for name in entry.names],
                found=f"{len(together)} Parameters over one storage",
                wanted="memory of their own, or one Parameter under several names",
            )
