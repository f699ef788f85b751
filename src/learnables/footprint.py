"""What a model and its optimizer take up on each of N ranks, before there are N ranks.

Reckoned on the meta device, where nothing is stored: the shards that `learnables.launch.shard_`
would make, and the bytes that DDP or FSDP2 send for them in a step.
"""

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables.arguments import optimizers_in
from learnables.entries import Entry, entries
from learnables.errors import LearnablesError
from learnables.launch import (
    STRATEGIES,
    Strategy,
    gathered_apart,
    make_ready_,
    placement_for,
    require_sendable,
)

_Stepper: TypeAlias = tuple[type[Optimizer], dict[str, Any]]


@final
@dataclass(frozen=True)
class Footprint:
    """Bytes on the fullest rank; activations are not among them, they depend on the batch.

    Attributes:
        ranks: How many there are.
        strategy: ``"none"``, ``"ddp"`` or ``"fsdp2"``.
        numbers: Parameters of the whole model, shared ones once.
        parameters: Bytes of the parameters that a rank keeps.
        gradients: Bytes of their gradients.
        optimizer: Bytes of the optimizer's state after a step.
        gathered: FSDP2: bytes of whole parameters at the fullest moment, which is the root's own
            and those of the largest unit. One more unit may lie beside it while it is fetched.
        sent: Bytes that a rank sends, and receives, in a step of one backward. FSDP2 gathers the
            units twice and the root's own once, and scatters gradients; DDP sums gradients in a
            ring.
    """

    ranks: int
    strategy: str
    numbers: int
    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    sent: int

    @property
    def memory(self) -> int:
        """All that is kept between steps, and what is gathered in them."""
        return self.parameters + self.gradients + self.optimizer + self.gathered

    def to_json(self) -> dict[str, Any]:
        """Plain data, ``memory`` included."""
        return {**asdict(self), "memory": self.memory}

    def __str__(self) -> str:
        """A line for each kind of bytes."""
        kinds = ("parameters", "gradients", "optimizer", "gathered", "memory", "sent")
        head = f"{self.numbers:,} parameters, {self.strategy} × {self.ranks}, on each rank:"
        words = {"memory": "memory in all", "sent": "sent per step"}
        return "\n".join(
            [head, *(f"  {words.get(k, k):14}{getattr(self, k) / 2**20:12,.2f} MiB" for k in kinds)]
        )


def footprint(
    model: nn.Module,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    strategy: Strategy = "fsdp2",
    *,
    ranks: int,
    units: Sequence[str] | None = None,
) -> Footprint:
    """Reckon what each of ``ranks`` ranks keeps and sends; the model is copied to the meta device.

    Args:
        model: On any device; the meta device costs nothing.
        optimizers: The optimizer of ``model``, or several. The state of each is measured by a step
            on the meta device; what none of them holds has no state. Without any, AdamW.
        strategy: As for `ln.prepare`.
        ranks: How many.
        units: As for `ln.prepare`.

    Raises:
        LearnablesError: There is no such strategy, fewer than one rank, or a parameter that
            `ln.prepare` would refuse.

    Example:
        >>> small = footprint(nn.Linear(64, 64, bias=False), strategy="fsdp2", ranks=4)
        >>> small.parameters, small.optimizer  # a quarter of 64 · 64 · 4 bytes; twice that, a count
        (4096, 8196)
    """
    if strategy not in STRATEGIES or ranks < 1:
        raise LearnablesError(
            "there are no such ranks",
            found=f"{strategy!r} × {ranks}",
            wanted=f"one of {', '.join(STRATEGIES)}, and at least one rank",
        )
    if strategy != "none":
        require_sendable(model, strategy)
    several = optimizers_in(optimizers)
    states = [_stepper(entry, several) for entry in entries(model)]
    model = copy.deepcopy(model).to("meta")
    if strategy == "fsdp2":
        make_ready_(model)
    walk = entries(model)
    parts = ranks if strategy == "fsdp2" else 1
    kept = {entry: _share(entry, parts) for entry in walk}
    trained = [entry for entry in walk if entry.trainable]
    groups = _groups(model, walk, units) if strategy == "fsdp2" else []
    own, *blocks = groups or [[]]
    bytes_of = {entry: kept[entry] * entry.param.element_size() for entry in walk}

    def total(those: Sequence[Entry]) -> int:
        return sum(bytes_of[entry] for entry in those)

    if strategy == "fsdp2":
        gathers = total(own) + 2 * sum(map(total, blocks))
        sent = (ranks - 1) * (gathers + total(trained))
        gathered = ranks * (total(own) + max(map(total, blocks), default=0))
    else:
        share = 2 * (ranks - 1) / ranks if strategy == "ddp" else 0.0
        sent, gathered = math.ceil(share * total(trained)), 0
    return Footprint(
        ranks=ranks,
        strategy=strategy,
        numbers=sum(entry.param.numel() for entry in walk),
        parameters=total(walk),
        gradients=total(trained),
        optimizer=sum(
            _state(how, entry, kept[entry])
            for entry, how in zip(walk, states, strict=True)
            if how is not None and entry.trainable
        ),
        gathered=gathered,
        sent=sent,
    )


def _share(entry: Entry, parts: int) -> int:
    """Numbers on the fullest rank, padding included."""
    shape = entry.param.shape
    if parts == 1 or not shape:
        return entry.param.numel()
    dim = placement_for(shape, parts).dim % len(shape)
    return entry.param.numel() // max(1, shape[dim]) * -(-shape[dim] // parts)


def _groups(
    model: nn.Module, walk: Sequence[Entry], units: Sequence[str] | None
) -> list[list[Entry]]:
    """The root's own parameters, then those of each unit."""
    insides = [{id(m) for m in unit.modules()} for unit in gathered_apart(model, units)]
    groups: list[list[Entry]] = [[] for _ in range(len(insides) + 1)]
    for entry in walk:
        homes = (i for i, inside in enumerate(insides, 1) if id(entry.places[0].owner) in inside)
        groups[next(homes, 0)].append(entry)
    return groups


def _stepper(entry: Entry, optimizers: Sequence[Optimizer]) -> _Stepper | None:
    """What steps a parameter, and with which options."""
    if not optimizers:
        return torch.optim.AdamW, {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(p is entry.param for p in group["params"]):
                taken = inspect.signature(type(optimizer)).parameters
                options = {k: v for k, v in group.items() if k in optimizer.defaults and k in taken}
                return type(optimizer), options
    return None


def _state(how: _Stepper, entry: Entry, numbers: int) -> int:
    """Bytes that a step leaves behind for one parameter of so many numbers."""
    param = entry.param
    width = param.shape[-1] if param.ndim > 1 and numbers % param.shape[-1] == 0 else 1
    shape = (numbers // width, width) if width > 1 else (numbers,)
    one = nn.Parameter(torch.empty(shape, dtype=param.dtype, device="meta"))
    one.grad = torch.empty_like(one)
    kind, options = how
    optimizer: Any = kind([one], **options)
    optimizer.step()
    return sum(x.nbytes for x in optimizer.state[one].values() if isinstance(x, Tensor))
