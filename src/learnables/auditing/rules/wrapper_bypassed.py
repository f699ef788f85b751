"""LRN902: training goes through the wrapper."""

from collections.abc import Iterator

from torch import nn

from learnables._torch import ddp_parameters
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule


@rule("LRN902", needs=Stage.BACKWARD, subsumes=("LRN901",))
def wrapper_bypassed(evidence: Evidence) -> Iterator[Finding]:
    """A loss computed on the inner module, past the DDP wrapper around it.

    ## Why it matters

    DDP arms its reducer in its own `forward`. Called as `ddp.module(x)`, or through a method of the
    inner model, the backward reduces nothing: each rank trains on its own data, and the one that
    saves looks well.

    ## Example

    ```python
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Linear(4, 1)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def step():
        optimizer.zero_grad()
        loss = ddp.module(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## Use instead

    ```python
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Linear(4, 1)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def step():
        optimizer.zero_grad()
        loss = ddp(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## When to silence it

    Gradients are reduced by hand, or this part is meant to train on each rank alone.
    """
    wrapped = [w for w in evidence.wrappers if ddp_parameters(w) is not None]
    needed(wrapped, "a model wrapped in DistributedDataParallel")
    for wrapper in wrapped:
        inner = wrapper.module
        if not isinstance(inner, nn.Module) or _with_gradients(evidence, wrapper):
            continue
        if not _with_gradients(evidence, inner):
            continue
        mine = {id(p) for p in wrapper.parameters()}
        reached = [e for e in evidence.trainable() if id(e.param) in mine]
        reached = [e for e in reached if evidence.ever(e, "reached")]
        if reached:
            yield Finding(
                what="the loss is computed past the DDP wrapper, so no gradient is averaged",
                where=[name for e in reached for name in e.names],
                found=f"{type(inner).__name__} called in {evidence.n_of_n}, "
                f"{type(wrapper).__name__} never",
                wanted="the wrapper called: ddp(x)",
                location=_line(evidence, inner),
            )


def _with_gradients(evidence: Evidence, module: nn.Module) -> bool:
    return any(enabled for enabled, _ in evidence.called.get(id(module), ()))


def _line(evidence: Evidence, module: nn.Module) -> str | None:
    calls = [e for e in evidence.happened("forward") if e.subject is module]
    return calls[0].location if calls else None
