"""Watch a training loop from inside a ``with``: what it does, in order, and what that changes.

Everything here is undone when the ``with`` is left: the wrapped methods of torch's classes, the
global hooks, the function mode. Nothing is installed on import.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from learnables._torch import (
    clip_module,
    identity_of_graph,
    is_dtensor,
    is_uninitialised,
    leaves_of,
    local,
    on_module_forward,
    on_optimizer_step,
    on_parameter_registration,
    reduction_of,
    registered,
    sequence_now,
    tensors_in,
)
from learnables.auditing.evidence import (
    Amount,
    Ending,
    Event,
    EventKind,
    FunctionSeen,
    Held,
    Look,
    Phase,
    amount_of,
)
from learnables.auditing.memory import checksum
from learnables.auditing.patches import Patches
from learnables.auditing.places import users_line
from learnables.auditing.probes import check_functions
from learnables.auditing.survey import Survey
from learnables.auditing.trace import Trace
from learnables.entries import Entry
from learnables.runtime.precision import Judge, Promotion

SNAPSHOT_BUDGET = 2 << 30


class Observer:
    """Collects events and looks while its ``with`` is open.

    Args:
        survey: Who takes part; optimizers that show up later are added to it.
        budget: Bytes of rolling copies; values beyond are compared by checksum.
        on_boundary: For loops that do not call `begin` and `end` themselves: called when the first
            thing after an optimizer step happens, with whether the observer may be closed there.
        is_last: For such loops: whether nothing more is to be traced after the iteration at work.
        taking_turns: How many optimizers there are at least, known or not.
        on_event: Called after each event.
        trace: Whether to follow the calls, for the endings.
    """

    def __init__(
        self,
        survey: Survey,
        *,
        budget: int = SNAPSHOT_BUDGET,
        on_boundary: Callable[[bool], None] | None = None,
        is_last: Callable[[], bool] | None = None,
        taking_turns: int = 1,
        on_event: Callable[[Event], None] | None = None,
        trace: bool = True,
    ) -> None:
        self.survey = survey
        self.events: list[Event] = []
        self.iteration = 0
        self.losses: list[float | None] = []
        self.called: dict[int, set[tuple[bool, bool]]] = {}
        self.slots: list[_Slot] = []
        self._budget = budget
        self._on_boundary = on_boundary
        self._is_last = is_last
        self._taking_turns = taking_turns
        self._on_event = on_event
        self._patches = Patches()
        params = (entry.param for entry in survey.entries)
        self.trace = Trace(params, self._registered_now) if trace else None
        if self.trace is not None:
            named = ((entry.param, entry.name) for entry in survey.entries)
            self.trace.promotions = Judge(named, users_line)
        self._sequences: list[int] = []
        self.batch_size: int | None = None
        self._is_open = False
        self._open_backward: dict[Tensor, Amount] | None = None
        self._inside_step: Event | None = None
        self._inside: set[str] = set()
        self._scaled: dict[int, Tensor] = {}
        self._pending: dict[int, Tensor] = {}
        self._backwards = 0
        self._steps = 0
        things: list[Entry | Held] = [*survey.entries, *survey.held]
        for thing in things:
            self._watch(thing)

    # -- opening and closing --------------------------------------------------------------------

    def __enter__(self) -> "Observer":
        """Install the patches."""
        try:
            self._install()
            if self.trace is not None:
                self.trace.__enter__()
            self._is_open = True
        except BaseException:
            self._patches.undo()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Take the patches off again."""
        self._is_open = False
        if self.trace is not None:
            self.trace.__exit__()
        self._patches.undo()

    def _install(self) -> None:
        patches = self._patches
        patches.on_exit(on_optimizer_step(self._before_step, self._after_step))
        patches.on_exit(on_parameter_registration(self._registered).remove)
        patches.on_exit(on_module_forward(self._called))
        patches.wrap(torch.autograd, "backward", self._wrap_backward)
        patches.wrap(torch.autograd, "grad", self._wrap_grad)
        patches.wrap(Optimizer, "zero_grad", self._wrap_zero_grad)
        patches.wrap(Optimizer, "__init__", self._wrap_new_optimizer)
        patches.wrap(nn.Module, "zero_grad", self._wrap_zero_grad)
        patches.wrap(nn.Module, "load_state_dict", self._wrap_load)
        patches.wrap(nn.Module, "to_empty", self._wrap_to_empty)
        patches.wrap(clip_module(), "_clip_grads_with_norm_", self._wrap_clip_norm)
        patches.wrap(torch.nn.utils, "clip_grad_value_", self._wrap_clip_value)
        for name in ("scale", "unscale_", "step", "update"):
            wrap = getattr(self, f"_wrap_scaler_{name.rstrip('_')}")
            patches.wrap(torch.amp.GradScaler, name, wrap)
        for kind in _with_own_step(LRScheduler):
            patches.wrap(kind, "step", self._wrap_schedule)

    # -- iterations -----------------------------------------------------------------------------

    def begin(self, *, in_the_middle: bool = False) -> None:
        """A new iteration starts: take the values as they are now.

        Args:
            in_the_middle: Part of it may be over, so that its graph may be older than this call.
        """
        self._backwards = self._steps = 0
        if self.iteration:
            self._watch_newcomers()
        self._sequences.append(0 if in_the_middle else sequence_now())
        for slot in self.slots:
            slot.begin()
        if self.trace is not None:
            self.trace.begin()
            for slot in self.slots:
                if slot.is_state:
                    self.trace.follow_state(slot.start())
            if self._is_open and not self.trace.is_on:  # another optimizer showed up: go on
                self.trace.__enter__()

    def end(self, loss: Any = None) -> None:
        """The iteration is over; ``loss`` is what it returned."""
        with self._untraced():
            for slot in self.slots:
                slot.compare(slot.late_phase(self._backwards))
                if self.trace is not None and isinstance(slot.thing, Entry):
                    slot.used = self.trace.used(slot.tensor)
                elif self.trace is not None and slot.is_state:
                    slot.used = self.trace.reached_loss(slot.started)
                slot.end()
            self._find_endings()
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self.losses.append(float(loss.detach()))
        else:
            self.losses.append(float(loss) if isinstance(loss, (int, float)) else None)
        self._scaled.clear()
        self._backwards = self._steps = 0
        self.iteration += 1

    def _find_endings(self) -> None:
        if self.trace is None:
            return
        trainable = [s for s in self.slots if isinstance(s.thing, Entry) and s.thing.trainable]
        unhappy = [s.tensor for s in trainable if not s.is_happy]
        self.trace.end(unhappy)
        self.trace.suspect(unhappy)
        self.trace.suspect(_much_smaller_than_siblings(trainable))

    @property
    def endings(self) -> dict[Entry, Ending]:
        """Where the paths of parameters without a useful gradient end."""
        found = {} if self.trace is None else self.trace.endings
        return {
            slot.thing: found[id(slot.tensor)]
            for slot in self.slots
            if isinstance(slot.thing, Entry) and id(slot.tensor) in found
        }

    @property
    def shifts(self) -> dict[Entry, float]:
        """|Σ gradient| ÷ Σ |gradient| of the parameters that are only added to something."""
        found = {} if self.trace is None else self.trace.shifts
        return {
            slot.thing: found[id(slot.tensor)]
            for slot in self.slots
            if isinstance(slot.thing, Entry) and id(slot.tensor) in found
        }

    @property
    def promotions(self) -> tuple[Promotion, ...]:
        """Which parameters made which activations float32."""
        judge = None if self.trace is None else self.trace.promotions
        return () if judge is None else tuple(judge.found)

    @property
    def functions(self) -> tuple[FunctionSeen, ...]:
        """The user's autograd Functions, with what the derivative probe says of each."""
        if self.trace is None:
            return ()
        return tuple(
            FunctionSeen(kind, at, tuple(params), verdict)
            for kind, at, params, verdict in check_functions(self.trace)
        )

    @contextmanager
    def _untraced(self) -> Iterator[None]:
        """What the observer itself computes is not part of the step."""
        if self.trace is None:
            yield
            return
        self.trace.paused += 1
        try:
            yield
        finally:
            self.trace.paused -= 1

    @property
    def has_open_iteration(self) -> bool:
        """Something was observed since the last `end`."""
        return bool(self._backwards or self._steps)

    @property
    def has_stepped(self) -> bool:
        """An optimizer stepped since the last `end`."""
        return bool(self._steps)

    def looks(self) -> dict[Entry | Held, tuple[Look, ...]]:
        """For each watched thing, one look per iteration."""
        return {slot.thing: tuple(slot.looks) for slot in self.slots}

    def _registered_now(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What each name stands for at this moment, with the parameter of its entry."""
        for entry in self.survey.entries:
            for place in entry.places:
                now = registered(place.owner, place.local_name)
                if now is not None:
                    yield now, entry.param

    def _watch_newcomers(self) -> None:
        """Parameters under names that the audit did not find when it began: made on first use."""
        known = {(id(p.owner), p.local_name) for e in self.survey.entries for p in e.places}
        for entry in self.survey.all_entries():
            if any((id(p.owner), p.local_name) in known for p in entry.places):
                continue
            self.survey.entries.append(entry)
            self._watch(entry)
            if self.trace is not None:
                self.trace.follow(entry.param)

    def _watch(self, thing: Entry | Held) -> None:
        tensor = thing.param if isinstance(thing, Entry) else thing.tensor
        if is_uninitialised(tensor) or tensor.device.type == "meta":
            return
        size = tensor.numel() * tensor.element_size()
        copied = size <= self._budget
        self._budget -= size if copied else 0
        self.slots.append(_Slot(thing, tensor, copied=copied))

    # -- events ---------------------------------------------------------------------------------

    def _event(
        self,
        kind: EventKind,
        subject: Any = None,
        params: Iterable[Tensor] = (),
        arrived: Mapping[Tensor, Amount] | None = None,
        **details: Any,
    ) -> Event:
        event = Event(
            len(self.events),
            self.iteration,
            kind,
            users_line(),
            subject,
            tuple(params),
            arrived or {},
            {**details, "inside_step": self._inside_step},
        )
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)
        return event

    def _boundary(self, *, may_stop: bool = True) -> None:
        """Something happens that belongs to the next iteration if a step is already behind us.

        Not while a backward runs: optimizers that step inside it have stepped only in part.
        """
        busy = self._inside_step is not None or self._open_backward is not None
        if self._on_boundary is not None and self._steps and not busy:
            self._on_boundary(may_stop)

    def _graph_begins(self, before: int) -> None:
        """A parameter enters a graph: the next forward, also where no module is called for it."""
        if self._open_backward is not None and self.trace is not None:  # a checkpoint recomputes
            self.trace.on_graph = self._graph_begins
            return
        self._boundary(may_stop=False)  # a mode cannot be taken off inside a call that it watches
        self._sequences[-1] = before

    @property
    def _oldest_fresh(self) -> int:
        """Graph nodes below this number are stale.

        Each step of each of several optimizers is an iteration, and they take turns: what one of
        them trains with may have been computed before the step of another.
        """
        turns = max(1, self._taking_turns, len(self.survey.optimizers))
        return self._sequences[-turns] if turns <= len(self._sequences) else 0

    def _wrap_backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if self._open_backward is not None:  # re-entrant: a checkpoint recomputes inside
                with _Arrivals(leaves_of(tensors), self._open_backward, self.trace):
                    return original(tensors, *args, **kwargs)
            self._boundary(may_stop=self.trace is None or not self.trace.is_on)
            if not self._is_open:
                return original(tensors, *args, **kwargs)
            roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            if self.trace is not None:
                self.trace.backward_from(roots)
            with self._untraced():
                return run(roots, tensors, *args, **kwargs)

        def run(roots: list[Tensor], tensors: Any, *args: Any, **kwargs: Any) -> Any:
            cleared = [p for p in self._pending.values() if _is_cleared(p)]
            leaves = leaves_of(roots)
            if not self._backwards:
                for slot in self.slots:
                    slot.compare("forward")
                    slot.look_back(self.iteration)
            self._backwards += 1
            arrived: dict[Tensor, Amount] = {}
            self._open_backward = arrived
            try:
                with _Arrivals(leaves, arrived, self.trace):
                    result = original(tensors, *args, **kwargs)
            finally:
                self._open_backward = None
            for slot in self.slots:
                slot.after_backward(leaves, arrived, sums=self._backwards > 1)
            for p in cleared:
                self._pending.pop(id(p), None)
            self._pending.update({id(p): p for p in arrived})
            stale = tuple(x for x, youngest in leaves.values() if youngest < self._oldest_fresh)
            if self.trace is not None:
                self.trace.stale(stale)
            self._event(
                "backward",
                params=[leaf for leaf, _ in leaves.values()],
                arrived=arrived,
                stale=stale,
                cleared_before=tuple(cleared),
                roots=tuple(root.grad_fn.name() if root.grad_fn else "" for root in roots),
                loss=float(roots[0].detach()) if roots and roots[0].numel() == 1 else None,
                reduction=reduction_of(roots[0]) if len(roots) == 1 else "unknown",
                scaled=any(id(root) in self._scaled for root in roots),
                root_ids=tuple(map(identity_of_graph, roots)),
            )
            return result

        return backward

    def _wrap_grad(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            wanted = [inputs] if isinstance(inputs, Tensor) else list(inputs)
            result = original(outputs, inputs, *args, **kwargs)
            self._event("grad", params=[x for x in wanted if x.is_leaf])
            return result

        return grad

    def _wrap_zero_grad(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def zero_grad(subject: Any, *args: Any, **kwargs: Any) -> Any:
            self._boundary()
            params = [p for p in _params_of(subject) if p.grad is not None]
            result = original(subject, *args, **kwargs)
            for p in params:
                self._pending.pop(id(p), None)
            self._event("zero_grad", subject, params)
            return result

        return zero_grad

    def _wrap_new_optimizer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def __init__(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            original(optimizer, *args, **kwargs)
            at = users_line()
            name = f"the {type(optimizer).__name__} built at {at}"
            self.survey.add_optimizer(optimizer, name, given=False)
            self._event("optimizer", optimizer, _params_of(optimizer))

        return __init__

    def _wrap_load(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def load_state_dict(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = original(module, *args, **kwargs)
            self._event("load", module, module.parameters(), result=result)
            return result

        return load_state_dict

    def _wrap_to_empty(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def to_empty(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = original(module, *args, **kwargs)
            self._event("to_empty", module, module.parameters())
            return result

        return to_empty

    def _wrap_clip_norm(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def clip(parameters: Any, max_norm: float, total_norm: Tensor, *args: Any) -> Any:
            params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            result = original(params, max_norm, total_norm, *args)
            norm = float(total_norm) if isinstance(total_norm, Tensor) else total_norm
            self._event("clip", params=params, max_norm=float(max_norm), norm=norm)
            return result

        return clip

    def _wrap_clip_value(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def clip_grad_value_(parameters: Any, clip_value: float, *args: Any, **kw: Any) -> None:
            params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            original(params, clip_value, *args, **kw)
            self._event("clip", params=params, max_value=float(clip_value))

        return clip_grad_value_

    def _wrap_scaler_scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def scale(scaler: Any, outputs: Any) -> Any:
            result = original(scaler, outputs)
            self._file_scaler(scaler)
            if scaler.is_enabled():
                for x in [result] if isinstance(result, Tensor) else list(result):
                    self._scaled[id(x)] = x
                self._event("scale", scaler, factor=scaler.get_scale())
            return result

        return scale

    def _wrap_scaler_unscale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def unscale_(scaler: Any, optimizer: Optimizer) -> Any:
            result = original(scaler, optimizer)
            self._file_scaler(scaler)
            if scaler.is_enabled():
                self._event("unscale", scaler, _params_of(optimizer), optimizer=optimizer)
            return result

        return unscale_

    def _wrap_scaler_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(scaler: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            before = len(self.happened("step"))
            self._inside.add("scaler")
            try:
                result = original(scaler, optimizer, *args, **kwargs)
            finally:
                self._inside.discard("scaler")
            self._file_scaler(scaler)
            skipped = len(self.happened("step")) == before
            if scaler.is_enabled():
                self._steps += 1
                self._event(
                    "scaler_step",
                    scaler,
                    _params_of(optimizer),
                    optimizer=optimizer,
                    skipped=skipped,
                    factor=scaler.get_scale(),
                )
            return result

        return step

    def _wrap_scaler_update(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def update(scaler: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(scaler, *args, **kwargs)
            if scaler.is_enabled():
                self._event("scaler_update", scaler, factor=scaler.get_scale())
            return result

        return update

    def _wrap_schedule(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            outermost = "schedule" not in self._inside
            self._inside.add("schedule")
            try:
                result = original(scheduler, *args, **kwargs)
            finally:
                if outermost:
                    self._inside.discard("schedule")
            if outermost:
                if all(scheduler is not s for s in self.survey.schedulers):
                    self.survey.schedulers.append(scheduler)
                groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
                self._event("schedule", scheduler, lrs=tuple(float(g["lr"]) for g in groups))
            return result

        return step

    def happened(self, kind: EventKind) -> list[Event]:
        """Events of one kind so far."""
        return [event for event in self.events if event.kind == kind]

    def _file_scaler(self, scaler: Any) -> None:
        if all(scaler is not s for s in self.survey.scalers):
            self.survey.scalers.append(scaler)

    # -- hooks ----------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._file_optimizer(optimizer)
        closure = kwargs.get("closure") or next(iter(args[1:]), None)
        if not callable(closure):
            self._consume(optimizer)
            self._pause_trace()
            return None
        observed = self.adopt(optimizer, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": observed}
        return tuple(observed if a is closure else a for a in args), kwargs

    def adopt(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A step of ``optimizer`` calls ``closure``: what comes back is to be called instead.

        The forward and the backward are in there, so its first call is where an iteration begins.
        """
        calls = [0]
        self._file_optimizer(optimizer)
        self._pause_trace()

        def observed() -> Any:
            calls[0] += 1
            if calls[0] == 1 and self._is_open:
                self._boundary()
                if self._is_open:
                    self._inside_step = self._step_event(optimizer)
            if not self._is_open:
                return closure()
            self._resume_trace()
            loss = closure()
            if calls[0] == 1:
                self._consume(optimizer, self._inside_step)
            self._pause_trace()
            return loss

        return observed

    def _file_optimizer(self, optimizer: Optimizer) -> None:
        name = f"the {type(optimizer).__name__} stepped at {users_line()}"
        self.survey.add_optimizer(optimizer, name, given=False)

    def _step_event(self, optimizer: Optimizer) -> Event:
        params = _params_of(optimizer)
        lrs = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        return self._event(
            "step",
            optimizer,
            params,
            lrs={k: float(v) for k, v in lrs.items()},
            by_scaler="scaler" in self._inside,
        )

    def _consume(self, optimizer: Optimizer, event: Event | None = None) -> None:
        """Take what lies in ``.grad`` now, and the values before the step."""
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor) and bool(found_inf):  # a fused step that AMP makes void
            return
        held = {id(p) for p in _params_of(optimizer)}
        scale = getattr(optimizer, "grad_scale", None)
        with self._untraced():
            for slot in self.slots:
                slot.compare(slot.late_phase(self._backwards))
                slot.before_step(held, float(scale) if isinstance(scale, Tensor) else 1.0)
        event = event or self._step_event(optimizer)
        self._steps += 1
        self._inside_step = event
        for slot in self.slots:
            if id(slot.tensor) in held:
                slot.lr = event.details["lrs"][id(slot.tensor)]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._inside_step = None
        for slot in self.slots:
            if slot.stepped_now:
                slot.stepped_now = False
                slot.compare("step")
        self._resume_trace()
        if self.trace is None or self._on_boundary is None:
            return
        may_close = self._open_backward is None  # else the mode is in the middle of a call
        if may_close and self._steps and self._is_last is not None and self._is_last():
            self.trace.__exit__()
        else:
            self.trace.on_graph = self._graph_begins

    def _pause_trace(self) -> None:
        if self.trace is not None and "step" not in self._inside:
            self._inside.add("step")
            self.trace.paused += 1

    def _resume_trace(self) -> None:
        if self.trace is not None and "step" in self._inside:
            self._inside.discard("step")
            self.trace.paused -= 1

    def _registered(self, module: nn.Module, name: str, param: Tensor | None) -> None:
        old = registered(module, name)
        if param is not None and old is not param and "forward" not in self._inside:
            self._event("register", module, [param], name=name, old=old)

    def _called(self, module: nn.Module, args: Any) -> None:
        if self.batch_size is None:
            first = next(tensors_in(args if isinstance(args, tuple) else ()), None)
            self.batch_size = first.shape[0] if first is not None and first.ndim else None
        if torch.is_grad_enabled() and module.training:
            self._boundary()
        mode = (torch.is_grad_enabled(), module.training)
        self.called.setdefault(id(module), set()).add(mode)
        if any(module is w for w in self.survey.wrappers):
            self._event("forward", module)


class _Arrivals:
    """Hooks on leaves for the length of one backward; notes the gradient each of them is given."""

    def __init__(
        self,
        leaves: Mapping[int, tuple[Tensor, int]],
        into: dict[Tensor, Amount],
        trace: Trace | None,
    ) -> None:
        self._leaves, self._into, self._trace = leaves, into, trace
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for leaf, _ in self._leaves.values():
            self._handles.append(leaf.register_hook(self._hook(leaf)))  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, leaf: Tensor) -> Callable[[Tensor | None], None]:
        def note(gradient: Tensor | None) -> None:
            if gradient is None:  # a custom Function gave None back
                return
            self._into[leaf] = amount_of(local(gradient))
            if self._trace is not None:
                self._trace.arrived(leaf, local(gradient))

        return note


class _Slot:
    """One watched name: the tensor it stands for, its rolling copy, its looks."""

    def __init__(self, thing: Entry | Held, tensor: Tensor, *, copied: bool) -> None:
        self.thing, self.tensor, self.copied = thing, tensor, copied
        self.looks: list[Look] = []
        self.used: bool | None = None
        self.stepped_now = False
        self.first = self._copy(tensor) if copied else None
        self._take(tensor)
        self._clean()

    def _clean(self) -> None:
        self.is_happy = False
        self.is_back = False
        self.accumulated: Amount | None = None
        self.reached = False
        self.arrived = 0
        self.gradient: Amount | None = None
        self.consumed_strides: tuple[int, ...] | None = None
        self.delivered_strides: tuple[int, ...] | None = None
        self.stepped = False
        self.lr: float | None = None
        self.changes: dict[Phase, Amount] = {}

    @property
    def is_state(self) -> bool:
        """A plain attribute that may carry a value from one iteration to the next."""
        x = self.tensor
        floating = x.is_floating_point() and not x.requires_grad
        return isinstance(self.thing, Held) and self.thing.kind == "attribute" and floating

    def start(self) -> Tensor:
        """The tensor that the name stands for as the iteration begins."""
        now = self.now()
        self.started = self.tensor if now is None else now
        return self.started

    def now(self) -> Tensor | None:
        """The tensor that the name stands for at this moment."""
        thing = self.thing
        if isinstance(thing, Entry):
            return registered(thing.owner, thing.local_name)
        owner, local_name = thing.owner, thing.name.rpartition(".")[2]
        if owner is None or thing.kind not in ("attribute", "buffer"):
            return self.tensor
        current = owner._buffers.get(local_name, vars(owner).get(local_name))
        return current if isinstance(current, Tensor) else self.tensor

    @staticmethod
    def _copy(x: Tensor) -> Tensor:
        return local(x.detach()).clone()

    def _take(self, x: Tensor) -> None:
        x = local(x.detach())
        if self.copied:
            self.last: Tensor | None = x.clone()
            self.sum = None
        else:
            self.last = None
            self.sum = checksum(x.untyped_storage())

    def compare(self, phase: Phase) -> None:
        """Note under ``phase`` by how much the value differs from the last look, and look."""
        current = self.now()
        if current is None or current.device.type == "meta":
            return
        x = local(current.detach())
        if self.last is None:
            total = checksum(x.untyped_storage())
            if total != self.sum:
                self.sum = total
                self.changes[phase] = Amount(float("nan"), float("nan"), 0, x.numel())
            return
        if x.shape != self.last.shape or x.dtype != self.last.dtype:
            self.changes[phase] = amount_of(x)
            self.last = x.clone()
        elif not same_bits(x, self.last):
            self.changes[phase] = amount_of(_difference(x, self.last))
            self.last.copy_(x)

    def look_back(self, iteration: int) -> None:
        """At the first backward: whether a step has moved the value and it is back at its start."""
        moved = bool(self.looks) and "step" in self.looks[-1].changes
        if iteration and moved and self.first is not None and self.last is not None:
            self.is_back = self.first.shape == self.last.shape and same_bits(self.first, self.last)

    def late_phase(self, backwards: int) -> Phase:
        """The phase between the last observed point and now."""
        if self.stepped:
            return "after"
        return "between" if backwards else "forward"

    def begin(self) -> None:
        current = self.now()
        if current is not None and current.device.type != "meta":
            self._take(current)
        self._clean()

    def after_backward(
        self,
        leaves: Mapping[int, tuple[Tensor, int]],
        arrived: dict[Tensor, Amount],
        *,
        sums: bool,
    ) -> None:
        """Note whether this backward reached the tensor, and whether a gradient came."""
        current = self.now()
        if current is None:
            return
        if is_dtensor(current) and current.grad is not None and current not in arrived:
            arrived[current] = amount_of(local(current.grad))  # FSDP2 puts it there itself
        self.reached = self.reached or id(current) in leaves or current in arrived
        self.arrived += current in arrived
        if current in arrived and current.grad is not None:
            self.delivered_strides = _strides_of(current.grad)
        if sums and current in arrived and current.grad is not None:
            self.accumulated = amount_of(local(current.grad))
        delivered = arrived.get(current)
        if delivered is not None and not delivered.is_zero:
            self.is_happy = delivered.nonfinite == 0

    def before_step(self, held: set[int], scale: float) -> None:
        """Note the gradient the optimizer is about to consume."""
        if self.stepped or not isinstance(self.thing, Entry):
            self.stepped_now = id(self.tensor) in held
            return
        current = self.now()
        grad = current.grad if current is not None and current.is_leaf else None
        if grad is not None:
            self.consumed_strides = _strides_of(grad)
            amount = amount_of(local(grad))
            self.gradient = Amount(
                amount.norm / scale, amount.absmax / scale, amount.nonfinite, amount.count
            )
        self.stepped = self.stepped_now = id(current) in held or id(self.tensor) in held

    def end(self) -> None:
        """Close the look of this iteration."""
        current = self.now()
        if self.gradient is None and not self.stepped and isinstance(self.thing, Entry):
            grad = current.grad if current is not None and current.is_leaf else None
            self.gradient = None if grad is None else amount_of(local(grad))
            self.consumed_strides = None if grad is None else _strides_of(grad)
        value = None
        if current is not None and current.device.type != "meta":
            value = amount_of(local(current))
        self.looks.append(
            Look(
                self.used,
                self.reached,
                self.arrived,
                self.gradient,
                self.accumulated,
                self.stepped,
                self.lr,
                value,
                dict(self.changes),
                current is self.tensor,
                self.is_back,
                self.consumed_strides,
                self.delivered_strides,
            )
        )


def _strides_of(gradient: Tensor) -> tuple[int, ...] | None:
    part = local(gradient)
    return tuple(part.stride()) if part.layout is torch.strided else None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal bit for bit, NaN included."""
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    as_real = torch.view_as_real if a.is_complex() else (lambda x: x)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    x, y = as_real(a), as_real(b)
    kind = words[x.element_size()]
    return torch.equal(x.contiguous().view(kind), y.contiguous().view(kind))


def _difference(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.bool:
        return a ^ b
    if a.element_size() == 1 and a.is_floating_point():  # torch has no arithmetic in eight bits
        a, b = a.float(), b.float()
    return a - b


def _much_smaller_than_siblings(slots: Iterable[_Slot]) -> list[Tensor]:
    """Parameters whose gradient is round-off beside that of the other parameters of their owner."""
    by_owner: dict[int, list[_Slot]] = {}
    for slot in slots:
        if isinstance(slot.thing, Entry) and slot.gradient is not None:
            by_owner.setdefault(id(slot.thing.owner), []).append(slot)
    largest = max((_size(s) for group in by_owner.values() for s in group), default=0.0)
    return [
        slot.tensor
        for group in by_owner.values()
        for slot in group
        if _size(slot) < 1e-3 * max(map(_size, group)) or _size(slot) < 1e-4 * largest
    ]


def _size(slot: _Slot) -> float:
    return slot.gradient.absmax if slot.gradient is not None else 0.0


def _is_cleared(p: Tensor) -> bool:
    return p.grad is None or not bool(local(p.grad).any())


def _params_of(subject: Any) -> list[Tensor]:
    if isinstance(subject, nn.Module):
        return list(subject.parameters())
    return [p for group in subject.param_groups for p in group["params"]]


def _with_own_step(kind: type[Any]) -> list[type[Any]]:
    found: list[type[Any]] = [kind] if "step" in vars(kind) else []
    for child in kind.__subclasses__():
        found += _with_own_step(child)
    return list(dict.fromkeys(found))
