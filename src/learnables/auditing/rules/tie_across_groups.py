"""LRN906: both names of a tie are gathered together."""

from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from learnables._torch import is_dtensor, sharding_groups
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule
from learnables.notes import note_of, notes_of


@rule("LRN906", needs=Stage.MODEL, subsumes=("LRN703", "LRN905"))
def tie_across_groups(evidence: Evidence) -> Iterator[Finding]:
    """A shared parameter whose names `fully_shard` has put into different groups.

    ## Why it matters

    FSDP2 gathers a group when the forward of its module begins. Two calls of `fully_shard` make two
    sharded Parameters out of a shared one, which the first forward refuses; a transposed tie finds
    only the part of its source that lies on this rank.

    ## Example

    ```python
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    ln.tie(model, "head.weight", "embed.weight")
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model["embed"], mesh=mesh)
    fully_shard(model["head"], mesh=mesh)
    ```

    ## Use instead

    ```python
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    ln.tie(model, "head.weight", "embed.weight")
    mesh = init_device_mesh("cpu", (1,))
    fully_shard([model["embed"], model["head"]], mesh=mesh)
    ```

    `ln.prepare(model, optimizer_fn, strategy="fsdp2")` does it.

    ## When to silence it

    Never: the first forward raises.
    """
    needed([e for e in evidence.entries if is_dtensor(e.param)], "a sharded parameter")
    groups = sharding_groups(evidence.model)
    names = {
        (id(module), local): f"{prefix}.{local}" if prefix else local
        for prefix, module in evidence.model.named_modules()
        for local in {*module._parameters, *notes_of(module)}
    }
    shared: dict[int, dict[int, str]] = defaultdict(dict)
    whole_in: dict[str, tuple[nn.Module, ...]] = {}
    for number, (modules, held) in enumerate(groups):
        for before, owner, local in held:
            name = names.get((id(owner), local), local)
            shared[before].setdefault(number, name)
            whole_in[name] = modules
    for parts in shared.values():
        if len(parts) > 1:
            yield _finding(list(parts.values()), f"{len(parts)} groups")
    for module in evidence.model.modules():
        for local in notes_of(module):
            source = note_of(module, local).get("tied_to")
            modules = whole_in.get(source, ())
            if modules and not any(module is inner for m in modules for inner in m.modules()):
                where = [source, names[id(module), local]]
                yield _finding(where, f"{where[1]} outside the group of {source}, its transpose")


def _finding(where: list[str], found: str) -> Finding:
    owners = ", ".join(f"model.get_submodule({name.rpartition('.')[0]!r})" for name in where)
    return Finding(
        what="a shared parameter is sharded in groups that are gathered apart",
        where=where,
        found=found,
        wanted=f"one group for all its names: fully_shard([{owners}]), on a model built anew",
    )
