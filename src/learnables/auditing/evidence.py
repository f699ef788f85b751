"""What the rules may look at. Gathered once, never changed afterwards.

Five views of the same training, and every finding is a disagreement between two of them:

* the *model*: entries (registered parameters) and held tensors (everything else that is reachable);
* the *optimizers*: their groups, whatever they hold;
* the *timeline*: what the loop did, in order, each with the line of the user's code;
* the *looks*: what happened to one parameter in one iteration;
* the *endings*: where, in the user's code, a parameter's path to the loss ends.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import ddp_parameters, is_dtensor, is_uninitialised
from learnables.auditing.experiments import Experiments
from learnables.auditing.intent import Intent, Loaded, means
from learnables.auditing.places import library_of
from learnables.entries import Entry
from learnables.runtime.precision import Promotion


class Stage(IntEnum):
    """How far training had come when the evidence was taken."""

    MODEL = 1
    """The model was walked."""
    OPTIMIZER = 2
    """At least one optimizer is known."""
    BACKWARD = 3
    """At least one backward was observed."""
    STEP = 4
    """At least one optimizer step was observed."""


Kind: TypeAlias = Literal["buffer", "attribute", "hidden module", "closure", "optimizer"]
Phase: TypeAlias = Literal["forward", "between", "step", "after"]
PHASES: tuple[Phase, ...] = ("forward", "between", "step", "after")


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor that can be reached but is not a registered parameter of a model.

    Attributes:
        name: The path to it as one would type it below the model: ``scales.0``, ``cache.pos``.
        tensor: The tensor.
        kind: Where it lies: a registered buffer; a plain attribute (also through lists, dicts and
            objects); a module that no module registers; a closure of a hook or of ``step``; only
            an optimizer.
        owner: The nearest module above it, None for a closure or an optimizer.
        saved: Whether ``state_dict()`` would contain it.
    """

    name: str
    tensor: Tensor
    kind: Kind
    owner: nn.Module | None = None
    saved: bool = False


@dataclass(frozen=True, eq=False)
class Group:
    """One parameter group of one optimizer, as it was when the audit began.

    Attributes:
        params: What it holds, registered anywhere or not.
        options: Everything else of the group: ``lr``, ``weight_decay``, ``initial_lr``, …
        index: Its place in ``optimizer.param_groups``.
    """

    params: tuple[Tensor, ...]
    options: Mapping[str, Any]
    index: int


@dataclass(frozen=True, eq=False)
class OptimizerSeen:
    """One optimizer: handed to the audit, found in the closure of ``step``, or seen stepping.

    Attributes:
        optimizer: The object.
        groups: Its groups at the beginning, or when it was first seen.
        name: How messages call it: ``optimizer``, ``optimizers[1]``, ``the SGD built at f.py:3``.
        given: Whether the caller handed it over.
    """

    optimizer: Optimizer
    groups: tuple[Group, ...]
    name: str
    given: bool


@dataclass(frozen=True)
class Amount:
    """The size of a tensor at one moment: of a gradient, a value or a change."""

    norm: float
    absmax: float
    nonfinite: int
    count: int

    @property
    def is_zero(self) -> bool:
        """Every entry is exactly 0."""
        return self.absmax == 0 and self.nonfinite == 0


EventKind: TypeAlias = Literal[
    "zero_grad",
    "backward",
    "grad",
    "clip",
    "scale",
    "unscale",
    "scaler_step",
    "scaler_update",
    "step",
    "schedule",
    "load",
    "to_empty",
    "register",
    "optimizer",
    "forward",
]


@dataclass(frozen=True, eq=False)
class Event:
    """One thing the loop did.

    Attributes:
        index: Position in the timeline.
        iteration: Which observed iteration it belongs to.
        kind: ``backward`` is one call of it; ``grad`` one of ``torch.autograd.grad``; ``step`` one
            of an optimizer that really ran; ``scaler_step`` one of ``GradScaler.step``, whether or
            not an optimizer step came of it; ``register`` a Parameter assigned to a module while
            the loop ran; ``optimizer`` one that was built; ``forward`` the call of a module that
            no other observed module was calling.
        location: ``file:line`` of the user's code.
        subject: The optimizer, scaler, scheduler or module it was done to.
        params: What it concerned: cleared, reached in the graph, clipped, stepped, registered.
        arrived: For a backward: the gradient that it delivered to each parameter.
        details: What else the kind has to say, named in `learnables.auditing.observe`.
    """

    index: int
    iteration: int
    kind: EventKind
    location: str | None
    subject: Any = None
    params: tuple[Tensor, ...] = ()
    arrived: Mapping[Tensor, Amount] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def ids(self) -> frozenset[int]:
        """Identities of `params`, for quick membership."""
        return frozenset(map(id, self.params))


@dataclass(frozen=True)
class Look:
    """What happened to one parameter in one observed iteration.

    Attributes:
        used: Whether it entered a torch call outside the optimizer; of a plain attribute, whether
            the value it had at the start flowed into the loss; None where nobody traced.
        reached: In the graph of a backward of this iteration.
        arrived: Number of backwards that delivered a gradient to it.
        gradient: What the optimizer consumed; without a step, what lay in ``.grad`` at the end.
            None where there was none.
        accumulated: What lay in ``.grad`` after the last of several backwards.
        stepped: An optimizer that holds it stepped.
        lr: The learning rate of its group at that step.
        value: The value at the end of the iteration.
        changes: For each phase in which the value changed, by how much: in the ``forward`` (before
            the first backward), ``between`` backward and step, by the ``step``, ``after`` it.
        same_object: The name still stands for the same Parameter as when the audit began.
        consumed_strides: Of the gradient that the optimizer consumed, or of the part of it that
            lies on this rank; None where there was none.
        delivered_strides: Of the gradient as the last backward left it, likewise.
        back_at_start: At the first backward the value was, bit for bit, what it had been before the
            first observed iteration, although the step of the last iteration had changed it.
    """

    used: bool | None
    reached: bool
    arrived: int
    gradient: Amount | None
    accumulated: Amount | None
    stepped: bool
    lr: float | None
    value: Amount | None
    changes: Mapping[Phase, Amount]
    same_object: bool
    back_at_start: bool = False
    consumed_strides: tuple[int, ...] | None = None
    delivered_strides: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Contribution:
    """The gradient that one backward delivered to one parameter, and what became of it."""

    backward: Event
    consumed_by: tuple[Event, ...]
    discarded_by: Event | None


@dataclass(frozen=True)
class Ending:
    """Where a parameter's path to the loss ends.

    Attributes:
        kind: ``cut`` (an output without graph), ``dropped`` (a result nobody used), ``unused`` (it
            entered no call), ``stale`` (gradient comes through a graph of an earlier iteration),
            ``silent`` (in the graph, reached, and no or zero gradient comes back).
        op: The call that did it, e.g. ``.data``, ``item``, ``softmax``.
        location: ``file:line`` of the user's code.
    """

    kind: Literal["cut", "dropped", "unused", "stale", "silent"]
    op: str = ""
    location: str | None = None


@dataclass(frozen=True, eq=False)
class FunctionSeen:
    """A custom ``autograd.Function`` that the step applied.

    Attributes:
        kind: The class.
        location: ``file:line`` of the call.
        params: For each tensor input that asks for a gradient, what it depends on.
        verdict: What the derivative probe found for each of these inputs: the largest
            |numeric − analytic| over the largest |numeric|; None where it could not tell.
    """

    kind: type
    location: str | None
    params: tuple[tuple[Tensor, ...], ...]
    verdict: tuple[float | None, ...]


@dataclass(frozen=True)
class Crash:
    """A step that raised."""

    iteration: int
    error: BaseException
    location: str | None


@dataclass(frozen=True, eq=False)
class Evidence:
    """A read-only picture of models, optimizers and some iterations of their training.

    Attributes:
        stage: The last stage the picture covers.
        model: The model.
        modules: Further modules by name; their entries carry the name as prefix.
        found_modules: Those of `modules` that nobody handed over: found in the closure of ``step``.
        entries: Every registered parameter once, of the model and of `modules`.
        held: Every other tensor that can be reached.
        optimizers: All of them.
        events: The timeline.
        iterations: Number of complete observed iterations.
        losses: What each iteration's ``step`` returned (or, around a user's loop, what backward was
            called on); None where that was no scalar tensor.
        looks: For each entry and each held tensor, one look per iteration.
        called: Identity of each module that was called → set of (gradients enabled, in training).
        endings: For each entry without a useful gradient, where its path ends, if it was traced.
        shifts: For entries that are only ever added to something and whose gradient looked small:
            |Σ gradient| ÷ Σ |gradient|; near the machine precision nothing depends on them.
        removed: Identities of parameters behind which a call follows that removes a shift: a
            softmax, a normalisation.
        written: Identity of a Parameter → ``file:line`` that last wrote into it in place, outside
            the optimizer.
        functions: The user's autograd Functions that were applied.
        promotions: Which parameters made activations float32 that would have been of 16 bits.
        first: A copy of the first value, for entries and held tensors within the memory budget.
        last: A copy of the last value, likewise.
        intent: What the author meant, merged from ``intent=`` and our own declarations.
        loaded: What was loaded.
        copies: Name → state dict or module that is meant to be an independent copy.
        scalers: All gradient scalers.
        schedulers: All learning-rate schedulers.
        wrappers: DDP and similar modules that wrap the model or are handed over.
        batch: What the caller handed over as ``batch``.
        batch_size: First dimension of the first input of the first module that was called.
        crash: The step that raised, if one did.
        experiments: What was found by running something again on request.
    """

    stage: Stage
    model: nn.Module
    entries: tuple[Entry, ...]
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    found_modules: frozenset[str] = frozenset()
    held: tuple[Held, ...] = ()
    optimizers: tuple[OptimizerSeen, ...] = ()
    events: tuple[Event, ...] = ()
    iterations: int = 0
    losses: tuple[float | None, ...] = ()
    looks: Mapping[Entry | Held, tuple[Look, ...]] = field(default_factory=dict)
    called: Mapping[int, set[tuple[bool, bool]]] = field(default_factory=dict)
    endings: Mapping[Entry, Ending] = field(default_factory=dict)
    shifts: Mapping[Entry, float] = field(default_factory=dict)
    removed: frozenset[int] = frozenset()
    written: Mapping[int, str] = field(default_factory=dict)
    functions: tuple[FunctionSeen, ...] = ()
    promotions: tuple[Promotion, ...] = ()
    first: Mapping[Tensor, Tensor] = field(default_factory=dict)
    last: Mapping[Tensor, Tensor] = field(default_factory=dict)
    intent: Intent = field(default_factory=Intent)
    loaded: Loaded | None = None
    copies: Mapping[str, Any] = field(default_factory=dict)
    scalers: tuple[Any, ...] = ()
    schedulers: tuple[Any, ...] = ()
    wrappers: tuple[nn.Module, ...] = ()
    batch: Any = None
    batch_size: int | None = None
    crash: Crash | None = None
    experiments: Experiments = field(default_factory=Experiments)

    # -- who is there ---------------------------------------------------------------------------

    def trainable(self) -> Iterator[Entry]:
        """Entries that ask for a gradient."""
        return (entry for entry in self.entries if entry.trainable)

    def held_as(self, *kinds: Kind) -> Iterator[Held]:
        """Held tensors of these kinds."""
        return (held for held in self.held if held.kind in kinds)

    @cached_property
    def entry_of(self) -> Mapping[int, Entry]:
        """Entry by the identity of its Parameter."""
        return {id(entry.param): entry for entry in self.entries}

    @cached_property
    def reduced(self) -> frozenset[int]:
        """Identities of the parameters that a DistributedDataParallel reduces."""
        tops = (self.model, *self.modules.values(), *self.wrappers)
        modules = (module for top in tops for module in top.modules())
        return frozenset(id(p) for module in modules for p in ddp_parameters(module) or ())

    @staticmethod
    def has_shape(entry: Entry) -> bool:
        """False for a lazy parameter that no forward has given a shape yet."""
        return not is_uninitialised(entry.param)

    @cached_property
    def strided(self) -> tuple[Entry, ...]:
        """Entries whose memory has a layout of its own: they are not sparse, sharded or lazy."""
        return tuple(
            entry
            for entry in self.entries
            if not (is_uninitialised(entry.param) or is_dtensor(entry.param))
            and entry.param.layout is torch.strided
        )

    @cached_property
    def not_contiguous(self) -> tuple[Entry, ...]:
        """Those of `strided` whose elements do not lie row by row."""
        return tuple(entry for entry in self.strided if not entry.param.is_contiguous())

    def entries_of_model(self) -> list[Entry]:
        """Entries of the model itself, without those of further modules."""
        mine = {id(p) for p in self.model.parameters()}
        return [entry for entry in self.entries if id(entry.param) in mine]

    def library_of(self, entry: Entry) -> str | None:
        """The installed package that wrote the module around this parameter; None if the user did.

        torch's own layers count as written by whoever put them together.
        """
        for root in (self.model, *self.modules.values()):
            at: nn.Module | None = root
            path = [root]
            for part in entry.places[0].name.split(".")[:-1]:
                at = at._modules.get(part) if at is not None else None
                path += [at] if at is not None else []
            if at is entry.owner:
                packages = [library_of(type(module)) for module in reversed(path)]
                return next((p for p in packages if p != ""), None)
        return None

    def is_found(self, entry: Entry) -> bool:
        """Whether it belongs only to modules that nobody handed over."""
        return all(name.partition(".")[0] in self.found_modules for name in entry.names)

    def name_of(self, tensor: Tensor) -> str | None:
        """The name messages call ``tensor`` by; None for a stranger."""
        entry = self.entry_of.get(id(tensor))
        if entry is not None:
            return entry.name
        return next((held.name for held in self.held if held.tensor is tensor), None)

    def entries_named(self, pattern: str) -> list[Entry]:
        """Entries that a name, a prefix or a glob means."""
        return [e for e in self.entries if any(means(pattern, name) for name in e.names)]

    def meant(self, patterns: Iterable[str]) -> list[Entry]:
        """Entries that any of several names, prefixes or globs means."""
        chosen = {id(e): e for pattern in patterns for e in self.entries_named(pattern)}
        return [e for e in self.entries if id(e) in chosen]

    # -- optimizers -----------------------------------------------------------------------------

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups of all optimizers."""
        return tuple(group for seen in self.optimizers for group in seen.groups)

    @cached_property
    def _groups_by_id(self) -> Mapping[int, list[Group]]:
        found: dict[int, list[Group]] = {}
        for group in self.groups:
            for param in group.params:
                found.setdefault(id(param), []).append(group)
        return found

    def groups_of(self, entry: Entry | Held) -> list[Group]:
        """Groups that hold it, once per occurrence."""
        tensor = entry.param if isinstance(entry, Entry) else entry.tensor
        return self._groups_by_id.get(id(tensor), [])

    # -- what happened --------------------------------------------------------------------------

    def looks_at(self, entry: Entry | Held) -> tuple[Look, ...]:
        """One look per iteration; empty where nothing was observed."""
        return self.looks.get(entry, ())

    def ever(self, entry: Entry | Held, *what: str) -> bool:
        """Whether any look has one of these boolean attributes, e.g. ``"reached"``."""
        return any(getattr(look, name) for look in self.looks_at(entry) for name in what)

    def shift_is_removed(self, entry: Entry) -> bool:
        """Whether a softmax or a normalisation follows on what the parameter is added to."""
        return id(entry.param) in self.removed

    def is_poisoned(self, iteration: int) -> bool:
        """Whether some value was NaN or infinite when an iteration began: then all may be."""
        if iteration == 0:
            floating = (x for x in self.first.values() if x.is_floating_point())
            return any(not bool(torch.isfinite(x).all()) for x in floating)
        before = (looks[iteration - 1] for looks in self.looks.values() if len(looks) >= iteration)
        return any(look.value is not None and look.value.nonfinite for look in before)

    def happened(self, *kinds: EventKind) -> list[Event]:
        """Events of these kinds, in order."""
        return [event for event in self.events if event.kind in kinds]

    @cached_property
    def _ledger(self) -> Mapping[int, list[Contribution]]:
        return _balance(self.events)

    def contributions(self, entry: Entry) -> Sequence[Contribution]:
        """Every gradient a backward delivered to it, and which steps consumed it."""
        return self._ledger.get(id(entry.param), ())

    @property
    def n_of_n(self) -> str:
        """``4 of 4 observed iterations``: how much a verdict of "never" rests on."""
        return f"{self.iterations} of {self.iterations} observed iterations"


def _balance(events: Sequence[Event]) -> dict[int, list[Contribution]]:
    """Follow each delivered gradient until a step consumes it or something clears it."""
    pending: dict[int, list[tuple[Event, list[Event]]]] = {}
    done: dict[int, list[Contribution]] = {}

    def close(key: int, by: Event | None) -> None:
        for backward, steps in pending.pop(key, ()):
            lost = by if not steps else None
            done.setdefault(key, []).append(Contribution(backward, tuple(steps), lost))

    def consume(step: Event) -> None:
        for param in step.params:
            for _, steps in pending.get(id(param), ()):
                if step not in steps:
                    steps.append(step)

    running: Event | None = None  # consumes when it is over: a closure may clear first
    for event in events:
        if running is not None and event.details.get("inside_step") is not running:
            consume(running)
            running = None
        if event.kind == "backward":
            for cleared in event.details.get("cleared_before", ()):
                close(id(cleared), event)
            inside = event.details.get("inside_step")  # a closure: its step consumes it
            for param in event.arrived:
                pending.setdefault(id(param), []).append((event, [inside] if inside else []))
        elif event.kind == "zero_grad":
            for param in event.params:
                close(id(param), event)
        elif event.kind == "step":
            running = event
    if running is not None:
        consume(running)
    for key in list(pending):
        close(key, None)
    return done


def amount_of(x: Tensor) -> Amount:
    """Measure one tensor; NaN and Inf are counted and left out of the sizes."""
    x = x.detach()
    if x.is_sparse:
        x = x.coalesce().values()
    if x.is_quantized or x.device.type == "meta" or x.dtype == torch.bool or x.numel() == 0:
        return Amount(0.0, 0.0, 0, x.numel())
    if not (x.is_floating_point() or x.is_complex()):
        x = x.double()
    wide = x.float() if x.is_floating_point() and x.element_size() < 4 else x
    largest = wide.abs().max()
    if bool(torch.isfinite(largest)):
        return Amount(float(wide.norm()), float(largest), 0, x.numel())
    good = torch.isfinite(wide)
    finite = wide[good]
    absmax = float(finite.abs().max()) if finite.numel() else 0.0
    bad = int(good.numel() - good.sum())
    return Amount(float(finite.norm()), absmax, bad, x.numel())
