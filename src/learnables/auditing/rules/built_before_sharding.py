"""LRN904: the optimizer is built after the model is sharded."""

from collections.abc import Iterator

from torch import nn

from learnables._torch import is_dtensor
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule


@rule("LRN904", needs=Stage.OPTIMIZER, subsumes=("LRN2", "LRN4"))
def built_before_sharding(evidence: Evidence) -> Iterator[Finding]:
    """An optimizer that holds the Parameters which `fully_shard` has replaced.

    ## Why it matters

    FSDP2 puts a new, sharded Parameter in the place of each one. An optimizer that was built before
    keeps the old ones: it steps them, the sharded ones never change, and nothing raises.

    ## Example

    ```python
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    ```

    ## Use instead

    ```python
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Linear(4, 1)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    `ln.prepare(model, optimizer_fn, strategy="fsdp2")` keeps this order.

    ## When to silence it

    Never: such an optimizer trains nothing.
    """
    sharded = [entry for entry in evidence.trainable() if is_dtensor(entry.param)]
    needed(sharded, "a sharded parameter")
    mine = {id(entry.param) for entry in evidence.entries}
    for seen in evidence.optimizers:
        old = [
            p
            for group in seen.groups
            for p in group.params
            if isinstance(p, nn.Parameter) and not is_dtensor(p) and id(p) not in mine
        ]
        shapes = {p.shape or (1,) for p in old}
        lost = [e for e in sharded if not evidence.groups_of(e) and e.shape in shapes]
        if lost:
            yield Finding(
                what="the optimizer was built before the model was sharded",
                where=[name for entry in lost for name in entry.names],
                found=f"{seen.name} holds {len(old)} whole Parameters that are in no module any "
                "more",
                wanted="the sharded ones, which fully_shard put in their place",
                mend="optimizer.param_groups.clear(); "
                "optimizer.add_param_group({'params': list(model.parameters())})"
                if len(seen.groups) == 1
                else "",
            )
