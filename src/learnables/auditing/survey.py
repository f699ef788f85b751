"""One look at everything that takes part: which tensors there are, and who acts on them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from learnables.auditing.evidence import Group, Held, Kind, OptimizerSeen
from learnables.auditing.reach import Found, reach
from learnables.entries import Entry, Place, entries


@dataclass
class Survey:
    """Who is there. Grows while the loop runs, when something new shows up.

    Attributes:
        model: The model.
        modules: Further modules by name, handed over.
        found_modules: Modules found in the closure of ``step``: criteria, teachers, critics.
        entries: Registered parameters of all of these, once each.
        held: All other reachable tensors.
        optimizers, schedulers, scalers, wrappers: The actors.
    """

    model: nn.Module
    modules: dict[str, nn.Module] = field(default_factory=dict)
    found_modules: dict[str, nn.Module] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    optimizers: list[OptimizerSeen] = field(default_factory=list)
    schedulers: list[Any] = field(default_factory=list)
    scalers: list[Any] = field(default_factory=list)
    wrappers: list[nn.Module] = field(default_factory=list)

    def add_optimizer(self, optimizer: Optimizer, name: str, *, given: bool) -> OptimizerSeen:
        """The record of ``optimizer``, made now if it is new."""
        for seen in self.optimizers:
            if seen.optimizer is optimizer:
                return seen
        groups = tuple(
            Group(tuple(group["params"]), {k: v for k, v in group.items() if k != "params"}, index)
            for index, group in enumerate(optimizer.param_groups)
        )
        self.optimizers.append(OptimizerSeen(optimizer, groups, name, given))
        return self.optimizers[-1]

    def all_entries(self) -> list[Entry]:
        """Every Parameter that is registered now."""
        return _all_entries(self)

    @property
    def known(self) -> set[int]:
        """Identities of all tensors that have a name already."""
        return {id(e.param) for e in self.entries} | {id(h.tensor) for h in self.held}


def survey(
    model: nn.Module,
    optimizers: Iterable[Optimizer],
    step: Callable[[], Any] | None,
    modules: Mapping[str, nn.Module],
    actors: Iterable[Any] = (),
) -> Survey:
    """Look around once; runs nothing of the user's."""
    found = Survey(model, dict(modules))
    given = list(optimizers)
    for i, optimizer in enumerate(given):
        name = "optimizer" if len(given) == 1 else f"optimizers[{i}]"
        found.add_optimizer(optimizer, name, given=True)
    for actor in actors:
        _file_actor(found, actor, "")
    if step is not None:
        for thing in reach(step, "step"):
            _file_actor(found, thing.value, thing.path[-1] or _last_name(thing), thing)
    found.entries = _all_entries(found)
    known = {id(e.param) for e in found.entries}
    registered = set(map(id, _all_modules(found)))
    for name, root in _roots(found):
        for thing in reach(root, name):
            _file_tensor(found, thing, known, registered)
    if step is not None:
        for thing in reach(step, ""):
            _file_tensor(found, thing, known, registered)
    _file_strangers(found, known)
    return found


def _roots(found: Survey) -> list[tuple[str, nn.Module]]:
    return [("", found.model), *found.modules.items(), *found.found_modules.items()]


def _all_modules(found: Survey) -> Iterable[nn.Module]:
    for _, root in _roots(found):
        yield from root.modules()


def _last_name(thing: Found) -> str:
    return next((part for part in reversed(thing.path) if part), "module")


def _file_actor(found: Survey, value: Any, name: str, thing: Found | None = None) -> None:
    if isinstance(value, Optimizer):
        found.add_optimizer(value, f"the {type(value).__name__} called {name!r}", given=False)
    elif isinstance(value, LRScheduler):
        if all(value is not s for s in found.schedulers):
            found.schedulers.append(value)
    elif isinstance(value, torch.amp.GradScaler):
        if all(value is not s for s in found.scalers):
            found.scalers.append(value)
    elif isinstance(value, nn.Module):
        _file_module(found, value, name, thing)


def _file_module(found: Survey, module: nn.Module, name: str, thing: Found | None) -> None:
    if module is found.model or any(module is w for w in found.wrappers):
        return
    inside = {id(m) for m in _all_modules(found)}
    if id(module) in inside:
        return
    if any(m is found.model for m in module.modules()):
        found.wrappers.append(module)
    elif thing is None or thing.owner is None:
        unique = name
        while unique in found.modules or unique in found.found_modules:
            unique += "_"
        found.found_modules[unique] = module


def _all_entries(found: Survey) -> list[Entry]:
    places: dict[Tensor, list[Place]] = {}
    for prefix, root in _roots(found):
        for entry in entries(root):
            for place in entry.places:
                name = f"{prefix}.{place.name}" if prefix else place.name
                renamed = Place(place.owner, place.local_name, name)
                places.setdefault(entry.param, []).append(renamed)
    return [Entry(p, tuple(where), i) for i, (p, where) in enumerate(places.items())]  # type: ignore[arg-type]


def _file_tensor(found: Survey, thing: Found, known: set[int], registered: set[int]) -> None:
    value = thing.value
    if not isinstance(value, Tensor) or id(value) in known:
        return
    known.add(id(value))
    kind, saved = _kind_of(thing, registered)
    found.held.append(Held(thing.name, value, kind, thing.owner, saved))


def _kind_of(thing: Found, registered: set[int]) -> tuple[Kind, bool]:
    if thing.through & {"closure", "hook"}:
        return "closure", False
    if thing.owner is not None and id(thing.owner) not in registered:
        return "hidden module", False
    local = thing.path[-1]
    if isinstance(thing.parent, nn.Module) and local in thing.parent._buffers:
        return "buffer", local not in thing.parent._non_persistent_buffers_set
    return "attribute", False


def _file_strangers(found: Survey, known: set[int]) -> None:
    """Name the tensors that only an optimizer holds."""
    for seen in found.optimizers:
        for group in seen.groups:
            names = group.options.get("param_names", ())
            for i, param in enumerate(group.params):
                if id(param) not in known:
                    known.add(id(param))
                    name = f"{seen.name}.param_groups[{group.index}]['params'][{i}]"
                    if i < len(names):
                        name = f"{name} ({names[i]})"
                    found.held.append(Held(name, param, "optimizer"))
