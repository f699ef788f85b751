"""LRN903: many devices are used by many processes."""

from collections.abc import Iterator

from torch import nn

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN903", needs=Stage.MODEL, severity="warning")
def data_parallel(evidence: Evidence) -> Iterator[Finding]:
    """A model wrapped in `nn.DataParallel`.

    ## Why it matters

    It copies the model to every device in each forward: what the forward writes to buffers or
    attributes of a replica is lost, and `parameters()` of a replica is empty. torch recommends
    DistributedDataParallel instead, also on one machine.

    ## Example

    ```python
    model = nn.DataParallel(nn.Linear(4, 4))
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4)  # and torchrun with DistributedDataParallel
    ```

    ## When to silence it

    One process has to do, and the forward writes nothing.
    """
    for module in (evidence.model, *evidence.modules.values(), *evidence.wrappers):
        if isinstance(module, nn.DataParallel):
            mine = {id(p) for p in module.parameters()}
            yield Finding(
                what="the model is wrapped in nn.DataParallel",
                where=[e.name for e in evidence.entries if id(e.param) in mine],
                found=f"replicas on {len(module.device_ids or ())} devices in one process",
                wanted="torch.nn.parallel.DistributedDataParallel, one process per device",
            )
