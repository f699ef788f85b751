"""Packed reductions over ranks and shards: two collectives, however many tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
import torch.distributed as dist
from torch import Tensor

from learnables.errors import LearnablesError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@final
@dataclass(frozen=True)
class Share:
    """How one DTensor is spread over its mesh, seen from this rank.

    Attributes:
        mesh: Where it lies.
        sharded: Mesh dimensions along which ranks hold different parts.
    """

    mesh: "DeviceMesh"
    sharded: frozenset[int]

    def counts(self, dims: Sequence[int]) -> bool:
        """Whether this rank contributes when reducing over mesh dimensions ``dims``.

        Along a dimension that only replicates, the first rank speaks for all.
        """
        here = self.mesh.get_coordinate()
        return here is not None and all(here[d] == 0 for d in dims if d not in self.sharded)


def share_of(x: Tensor, where: str = "") -> Share:
    """Read the placements of a DTensor.

    Args:
        x: A DTensor.
        where: What an error calls it.

    Raises:
        LearnablesError: A placement is partial: the values exist only after a reduction.
    """
    placements = x.placements  # type: ignore[attr-defined]
    if any(p.is_partial() for p in placements):
        raise LearnablesError(
            "a partial DTensor has no values before it is reduced",
            where=where,
            found=f"placements {tuple(placements)}",
            wanted="sharded or replicated placements",
            mend="x.redistribute(placements=[Replicate()])",
        )
    sharded = (i for i, p in enumerate(placements) if not p.is_replicate())
    return Share(x.device_mesh, frozenset(sharded))  # type: ignore[attr-defined]


def reduce_over(groups: "Sequence[ProcessGroup | None]", packed: Tensor, additive: int) -> Tensor:
    """Sum the first ``additive`` numbers over all ranks and take the maximum of the others.

    Args:
        groups: Process groups, one after the other; None is the default group.
        packed: One vector, of the same length on all ranks; float64 keeps counts exact up
            to 2^53. Shape ``(n,)``. It is reduced in place.
        additive: How many numbers are summed.

    Returns:
        ``packed``.

    Cost:
        Two collectives per group.
    """
    for group in groups:
        # Both are on their way before either is waited for: what they take is latency.
        parts = ((packed[:additive], dist.ReduceOp.SUM), (packed[additive:], dist.ReduceOp.MAX))
        works = [dist.all_reduce(part, op, group=group, async_op=True) for part, op in parts]
        for work in works:
            work.wait()
    return packed


def groups_over(
    mesh: "DeviceMesh", dims: Sequence[int]
) -> "tuple[list[ProcessGroup | None], list[int]]":
    """The groups to reduce over so that mesh dimensions ``dims`` are covered, as few as possible.

    Returns:
        The groups, and the mesh dimensions that they cover, which may be more than ``dims``: a
        rank that repeats another along one of them must contribute nothing.
    """
    if len(dims) > 1 and mesh.size() == dist.get_world_size():
        return [None], list(range(mesh.ndim))
    return [mesh.get_group(d) for d in dims], list(dims)


def gather_texts(text: str, device: torch.device) -> list[str]:
    """What every rank says, in the order of the ranks; all must call.

    Args:
        text: What this rank says; of any length.
        device: Where tensors of the default process group lie.

    Cost:
        Two collectives, for the lengths and for the texts, padded to the longest.
    """
    raw = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8).to(device)
    size = torch.tensor([len(text.encode())], device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    lengths = [int(n) for n in sizes]
    padded = raw.new_zeros(max(*lengths, 1))
    padded[: len(raw)] = raw[: len(padded)]
    everyones = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(everyones, padded)
    pairs = zip(everyones, lengths, strict=True)
    return [bytes(x[:n].cpu().numpy()).decode() for x, n in pairs]
