"""Change which blocks are stored while a model trains: every so many steps, by a rule.

Shapes: O out features, I in features, R × C the grid of blocks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import ddp_parameters, is_dtensor, without_wrappers
from learnables.errors import LayoutError, SelectionError
from learnables.sparse.layout import Layout
from learnables.sparse.topology import Rule, Standing, block_rms, gradient_rms


class Rewirable(Protocol):
    """A layer whose stored blocks can be exchanged, such as ``ln.nn.BlockSparseLinear``."""

    weight: nn.Parameter

    @property
    def layout(self) -> Layout:
        """Which blocks it stores."""

    def rewire(self, mask: Tensor, optimizer: "Optimizer | Iterable[Optimizer]" = ()) -> None:
        """Store these blocks from now on."""


def _is_rewirable(module: nn.Module) -> TypeGuard[Rewirable]:
    """Asked of the module: ``isinstance`` with a protocol sees no parameter on Python 3.12."""
    return all(hasattr(module, part) for part in ("weight", "layout", "rewire"))


@dataclass(frozen=True)
class Change:
    """What one update did to one layer.

    Attributes:
        step: Number of optimizer steps taken.
        layer: Name of the layer.
        dropped: How many blocks were dropped.
        grown: How many blocks are new.
        density: Share of its matrix that is stored afterwards.
    """

    step: int
    layer: str
    dropped: int
    grown: int
    density: float


def evolve(
    model: nn.Module,
    optimizer: Optimizer,
    rule: Rule,
    *,
    every: int = 100,
    until: int | None = None,
    scope: Literal["layer", "global"] = "layer",
    layers: Sequence[nn.Module] | None = None,
    seed: int = 0,
) -> "Evolution":
    """Exchange blocks of block-sparse layers after every so many optimizer steps.

    Blocks that stay keep their values and their optimizer state to the bit; new ones start at zero
    with zero state, so that the function of the model does not jump. Nothing needs to be called:
    the update follows ``optimizer.step()``.

    A rule that grows by gradient needs that of all blocks, also of those not stored. It is taken
    in the iteration before an update only, as one dense matrix per layer, and summed over
    micro-batches and over ranks. All ranks decide alike.

    Args:
        model: What holds the layers, wrapped or not. Layers that are compiled one by one must be
            compiled after this call; their hooks are part of what is compiled.
        optimizer: The optimizer of their weights, or the first of several to step.
        rule: ``SET()``, ``RigL()``, ``Prune(density)``.
        every: Optimizer steps from one update to the next.
        until: The last step with an update, when the schedule of the rule is over; None goes on at
            the rate of the beginning. Three quarters of the training is usual.
        scope: ``"layer"`` keeps the density of each layer; ``"global"`` lets the blocks of all
            layers compete. Then, and with ``Prune``, weights change their shape in place, which is
            refused at the first change where DDP or FSDP2 wrapped the model.
        layers: Which layers; None takes all block-sparse ones.
        seed: Of random growth, equal on all ranks.

    Returns:
        A handle: ``.history`` lists the changes, ``.remove()`` ends it, ``.state_dict()`` and
        ``.load_state_dict()`` carry it over a restart. Also a context manager.

    Raises:
        SelectionError: There is no block-sparse layer, or the optimizer does not hold its weight.
        LayoutError: ``every`` or ``until`` is no positive number.

    Example:
        >>> layer = ln.nn.BlockSparseLinear(32, 32, block=8, mask=torch.eye(4))
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> with evolve(layer, optimizer, ln.sparse.RigL(0.5), every=2) as evolution:
        ...     for _ in range(2):
        ...         x = torch.randn(64, 32)
        ...         (layer(x) - 9 * x.roll(8, 1)).square().mean().backward()
        ...         optimizer.step()
        >>> [(change.step, change.dropped, change.grown) for change in evolution.history]
        [(2, 2, 2)]

    Cost:
        Nothing between updates. An update costs one dense gradient per layer for ``RigL``, and a
        copy of weights and state.
    """
    chosen = None if layers is None else {id(layer) for layer in layers}
    found = {
        without_wrappers(f"{name}.weight").removesuffix("weight").removesuffix("."): module
        for name, module in model.named_modules()
        if _is_rewirable(module) and (chosen is None or id(module) in chosen)
    }
    if not found:
        raise SelectionError(
            "there is no block-sparse layer to evolve",
            found=f"{sum(1 for _ in model.modules())} modules",
            wanted="ln.nn.BlockSparseLinear",
            mend="ln.sparsify(model, selector)",
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    strangers = [name for name, layer in found.items() if id(layer.weight) not in held]
    if strangers:
        raise SelectionError(
            "the optimizer does not hold the weight of a layer",
            where=", ".join(f"{name}.weight" for name in strangers),
            found=f"{len(held)} other parameters",
            wanted="the optimizer that steps it",
            mend="build the optimizer after ln.sparsify, and pass it here",
        )
    if every < 1 or (until is not None and until < 1):
        raise LayoutError(
            "updates come after a positive number of steps",
            found=f"every={every}, until={until}",
            wanted="every ≥ 1, until ≥ 1 or None",
        )
    reduced = {id(p) for module in model.modules() for p in ddp_parameters(module) or ()}
    fixed = frozenset(name for name, layer in found.items() if id(layer.weight) in reduced)
    return Evolution(found, optimizer, rule, every, until, scope, seed, fixed)


@final
class Evolution:
    """The hooks of one `evolve`."""

    def __init__(
        self,
        layers: dict[str, Any],
        optimizer: Optimizer,
        rule: Rule,
        every: int,
        until: int | None,
        scope: str,
        seed: int,
        fixed: frozenset[str],
    ) -> None:
        self._layers, self._optimizer, self._rule = layers, optimizer, rule
        self._every, self._until, self._scope = every, until, scope
        self._generator = torch.Generator().manual_seed(seed)
        self._fixed = fixed
        self._initial = {name: layer.layout.num_blocks for name, layer in layers.items()}
        self._gradients: dict[str, Tensor] = {}
        self.steps = 0
        self.history: list[Change] = []
        self._hooks: list[Any] = [optimizer.register_step_post_hook(self._after_step)]
        if rule.needs_gradient:
            self._hooks += [
                layer.register_forward_hook(self._listener(name)) for name, layer in layers.items()
            ]

    def update(self) -> None:
        """Exchange blocks now, whatever the step."""
        progress = 0.0 if self._until is None else self.steps / self._until
        standings = {name: self._standing(name) for name in self._layers}
        self._gradients.clear()
        if any(s is None for s in standings.values()):
            return  # no gradient came, or one that is not finite: another time
        groups = [[name] for name in standings] if self._scope == "layer" else [list(standings)]
        for names in groups:
            taking_part = [standings[name] for name in names]
            masks = self._rule.next_masks(
                [s for s in taking_part if s is not None], progress, self._generator
            )
            for name, mask in zip(names, masks, strict=True):
                self._rewire(name, mask)

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs beside model and optimizer: tensors, numbers and strings."""
        return {
            "steps": self.steps,
            "initial": dict(self._initial),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.steps, self._initial = state["steps"], dict(state["initial"])
        self._generator.set_state(state["generator"])

    def remove(self) -> None:
        """Take the hooks away again; the blocks stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._gradients.clear()

    def __enter__(self) -> "Evolution":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _due_after(self, steps: int) -> bool:
        return steps % self._every == 0 and (self._until is None or steps <= self._until)

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        self.steps += 1
        if self._due_after(self.steps):
            self.update()

    def _listener(self, name: str) -> Callable[..., None]:
        def after_forward(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad and self._due_after(self.steps + 1):
                x = inputs[0].detach()
                output.register_hook(lambda g: self._add_gradient(name, g, x))  # type: ignore[no-untyped-call]

        return after_forward

    @torch.no_grad()
    def _add_gradient(self, name: str, g: Tensor, x: Tensor) -> None:
        g, x = g.detach().flatten(0, -2), x.flatten(0, -2)
        gradient = (g.mT @ x.to(g.dtype)).float()
        held = self._gradients.get(name)
        if held is not None and bool(held.isfinite().all()):
            held += gradient
        else:  # the first; or what is held is of an iteration that a scaler skipped
            self._gradients[name] = gradient

    def _standing(self, name: str) -> Standing | None:
        layer, layout = self._layers[name], self._layers[name].layout
        weight = layer.weight.full_tensor() if is_dtensor(layer.weight) else layer.weight
        size, initial = block_rms(weight, layout), self._initial[name]
        if not self._rule.needs_gradient:
            return Standing(layout.mask, size, initial)
        shape = (layout.out_features, layout.in_features)
        gradient = self._gradients.get(name)
        if gradient is None:
            gradient = torch.full(shape, float("nan"), device=weight.device)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(gradient)
        rms = gradient_rms(gradient, layout)
        return Standing(layout.mask, size, initial, rms) if bool(rms.isfinite().all()) else None

    def _rewire(self, name: str, mask: Tensor) -> None:
        layer = self._layers[name]
        before = layer.layout.mask
        if torch.equal(before, mask):
            return
        if name in self._fixed and int(mask.sum()) != int(before.sum()):
            raise LayoutError(
                "DistributedDataParallel cannot follow a weight that changes its number of blocks",
                where=f"{name}.weight",
                found=f"{int(mask.sum())} blocks",
                wanted=f"{int(before.sum())}, as when it was wrapped",
                mend="evolve with scope='layer' and SET or RigL, or prune before wrapping",
            )
        layer.rewire(mask, self._optimizer)
        dropped, grown = int((before & ~mask).sum()), int((mask & ~before).sum())
        change = Change(self.steps, name, dropped, grown, layer.layout.density)
        self.history.append(change)
