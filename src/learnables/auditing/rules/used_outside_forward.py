"""LRN905: what is sharded is used inside a forward that gathers it."""

import linecache
import re
from collections.abc import Iterator

from learnables._torch import is_dtensor
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule
from learnables.entries import Entry


@rule("LRN905", needs=Stage.MODEL, subsumes=("LRN3", "LRN4"))
def used_outside_forward(evidence: Evidence) -> Iterator[Finding]:
    """A sharded parameter that meets a plain tensor outside the forward of its FSDP2 module.

    ## Why it matters

    FSDP2 gathers a parameter when the forward of its module begins and lets it go at the end.
    Outside, the name stands for a DTensor, of which this rank has a part: with a plain tensor it
    raises, and alone, as in `p.norm().item()`, it gives the number of that part without a word.

    ## Example

    ```python
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.fc = nn.Linear(4, 1)

        def encode(self, x):
            return x * self.scale

        def forward(self, x):
            return self.fc(self.encode(x))

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = fully_shard(Net(), mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = model.encode(torch.ones(2, 4)).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    ## Use instead

    ```python
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.fc = nn.Linear(4, 1)

        def encode(self, x):
            return self.fc(x * self.scale)

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = fully_shard(Net(), mesh=init_device_mesh("cpu", (1,)))
    register_fsdp_forward_method(model, "encode")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = model.encode(torch.ones(2, 4)).square().mean()
        loss.backward()
        optimizer.step()
        return loss
    ```

    `ln.prepare(…, methods=("encode",))` does the same.

    ## When to silence it

    Never: the step raises.
    """
    sharded = [entry for entry in evidence.entries if is_dtensor(entry.param)]
    needed(sharded, "a sharded parameter")
    crash = evidence.crash
    if crash is not None and "mixed torch.Tensor and DTensor" in str(crash.error):
        guilty = _named_on(crash.location, sharded)
        yield Finding(
            what="a sharded parameter is used outside the forward of its module",
            where=[name for entry in guilty for name in entry.names],
            found=f"{type(crash.error).__name__}: a plain tensor and a DTensor in one call",
            wanted="a use inside forward, or inside a method that was given to "
            "torch.distributed.fsdp.register_fsdp_forward_method",
            location=crash.location,
        )


def _named_on(location: str | None, sharded: list[Entry]) -> list[Entry]:
    """The parameters whose name stands on the line; all of them where none does."""
    file, _, line = (location or "").rpartition(":")
    text = linecache.getline(file, int(line)) if line.isdigit() else ""
    words = set(re.findall(r"\w+", text))
    return [e for e in sharded if any(p.local_name in words for p in e.places)] or sharded
