"""LRN901: DDP reduces the Parameters that the model has now."""

from collections.abc import Iterator

from learnables._torch import ddp_parameters
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule


@rule("LRN901", needs=Stage.MODEL)
def replaced_after_wrapping(evidence: Evidence) -> Iterator[Finding]:
    """A trainable parameter that came after the model was wrapped in DDP.

    ## Why it matters

    DDP hooks the Parameter objects it finds when it is built. A new one, resized, initialised
    again or made lazily, has a gradient that is never averaged: every rank trains its own, and the
    ranks drift apart. `find_unused_parameters=True` hides the complaint about the old one.

    ## Example

    ```python
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Linear(4, 4)
    ddp = nn.parallel.DistributedDataParallel(model)
    model.bias = nn.Parameter(torch.zeros(4))
    step = None
    ```

    ## Use instead

    ```python
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Linear(4, 4)
    model.bias = nn.Parameter(torch.zeros(4))
    ddp = nn.parallel.DistributedDataParallel(model)
    step = None
    ```

    ## When to silence it

    The gradient of this parameter is reduced by hand.
    """
    wrapped = [(w, held) for w in evidence.wrappers if (held := ddp_parameters(w)) is not None]
    needed(wrapped, "a model wrapped in DistributedDataParallel")
    for wrapper, held in wrapped:
        known = {id(p) for p in held}
        ignored = set(getattr(wrapper, "parameters_to_ignore", ()))
        inside = {id(p): n for n, p in wrapper.named_parameters()}
        for entry in evidence.trainable():
            if id(entry.param) in known or id(entry.param) not in inside:
                continue
            if any(name in ignored for name in entry.plain_names):
                continue
            yield Finding(
                what="DDP does not know this parameter, so its gradient is never averaged",
                where=list(entry.names),
                found=f"not among the {len(held)} Parameters found when DDP was built",
                wanted="a model that is complete before it is wrapped",
            )
