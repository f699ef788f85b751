"""`learnables.watch`: look at parameters, consumed gradients and updates while a model trains."""

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import dtype_name, is_dtensor, make_last_pre_hook, own_share, pre_hooks_after
from learnables.arguments import (
    describe,
    require_module,
    require_text,
    require_whole,
)
from learnables.entries import Entry, entries
from learnables.errors import ArgumentError, LearnablesError, warn
from learnables.policy.kinds import kind_of
from learnables.select import Selector
from learnables.select import select as pick
from learnables.watching.alarm import Alarm
from learnables.watching.alarms import Judge
from learnables.watching.artifacts import document, images, table
from learnables.watching.asked import check_what, check_where, plain_numbers
from learnables.watching.encoding import Array
from learnables.watching.governor import Governor
from learnables.watching.gradient import Consumption, consumption, steppable
from learnables.watching.look import (
    Packed,
    Part,
    Wanted,
    begin,
    complete,
    leftover,
    read,
)
from learnables.watching.observation import OVERFLOWS, QUANTITIES, Observation
from learnables.watching.run import Run
from learnables.watching.scaler import Stepped, inside, listen
from learnables.watching.sentinel import Sentinel, Sighting, overflows, sightings
from learnables.watching.sinks.base import Sink
from learnables.watching.store import Store

_MOST_OVERFLOWS = 1000

OnAlarm: TypeAlias = "Callable[[Alarm], object] | Literal['stop'] | None"
_Step: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"


@final
class AlarmRaised(LearnablesError):  # noqa: N818 - reads as what happened
    """An alarm of severity error, where ``on_alarm="stop"`` asked for the end of the training."""


def watch(
    model: nn.Module,
    optimizer: "Optimizer | Iterable[Optimizer]",
    every: int = 100,
    to: "str | Path | None" = "runs/run",
    sinks: Sequence[Sink] = (),
    *,
    select: Selector = "*",
    quantities: Sequence[str] = QUANTITIES,
    histogram: bool = True,
    budget: float | None = 0.01,
    on_alarm: OnAlarm = None,
    scaler: Any = None,
    step: int = 0,
    resume: bool = False,
) -> "Watcher":
    """Record what every parameter, its gradient and its update do, while any loop trains.

    It sits on the optimizer's own hooks. What is recorded is the gradient that the optimizer
    consumes: accumulated, reduced over ranks, unscaled, clipped, whoever did these things. The
    update is what really changed in the step, projections of `learnables.attach` included, for any
    optimizer. The numbers are exact, of every element.

    Training is never disturbed: nothing is patched, no random number is drawn, no value is written,
    and when watching fails (a full disk, a bug of ours) it warns once and ends, and training goes
    on bit for bit as without it. Under ``torch.compile`` of the model there is no graph break and
    no recompilation; a step that is itself compiled as a whole cannot be looked into and is not.

    Args:
        model: The model, bare or wrapped.
        optimizer: The optimizer, or all of them: a GAN's two, Muon and AdamW, or one for each
            parameter where optimizers step inside backward. The one that steps most often counts.
        every: Look at the first step and at every multiple of this many, budget permitting.
        to: Folder of the run database; None for none. A folder that has one gets another.
        sinks: Where else the numbers go: `learnables.watching.sinks`.
        select: Which parameters, as in `learnables.annotate`; of these, those that train.
        quantities: Which of ``"weight"``, ``"gradient"``, ``"update"``.
        histogram: Whether to record histograms by sign and exponent.
        budget: Longest time for watching, as a share of the time for training; looks are put off
            to keep to it, but for the first five. None for no bound.
        on_alarm: Called with each alarm; what it raises ends the training. ``"stop"`` raises
            `AlarmRaised` for those of severity error.
        scaler: The ``torch.amp.GradScaler``, so that the steps it skips are recorded too where
            the optimizer is not fused, and whose gradients made it skip each of them also where
            gradients are clipped after ``unscale_``. For the length of the watch its ``step`` and
            ``unscale_`` are wrapped. The device is not waited for more often.
        step: Optimizer steps that were done before.
        resume: Continue the newest run of the folder; pass ``step`` too.

    Returns:
        The watcher: a context manager, or to be ended by ``close()``.

    Raises:
        ArgumentError: ``model`` is no module, ``optimizer`` no optimizer, ``scaler`` has no
            ``step``, or another argument is of another kind than it takes.
        LearnablesError: The optimizer steps outside torch's hooks (DeepSpeed) or holds no parameter
            of the model, or an argument has no meaning.
        SelectionError: ``select`` picks nothing.
        RunError: The folder cannot be written.

    Example:
        >>> from tempfile import mkdtemp
        >>> model = nn.Linear(8, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with ln.watch(model, optimizer, every=10, to=mkdtemp(), budget=None) as watcher:
        ...     for _ in range(20):
        ...         loss = model(torch.ones(4, 8)).square().mean()
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         watcher.log_scalars(watcher.step, {"loss": loss.item()})
        >>> [observation.step for observation in watcher.run().observations]
        [1, 10, 20]

    Cost:
        A look reads parameters and gradients, copies the parameters, and reads the change; memory
        for one more copy of them until the step ends. See docs/en/watch.md for measurements.
    """
    require_module(model)
    check_where(to, sinks, resume)
    check_what(quantities, histogram, budget, on_alarm, scaler)
    return Watcher(
        model,
        optimizer,
        require_whole(every, "every", least=1),
        to,
        sinks,
        selector=select,
        wanted=Wanted(tuple(quantities), histogram),
        budget=budget,
        on_alarm=on_alarm,
        scaler=scaler,
        step=require_whole(step, "step", least=0),
        resume=resume,
    )


@final
class Watcher:
    """A running `learnables.watch`.

    Attributes:
        alarms: Every alarm so far.
        governor: Decides when to look, and knows what that cost.
        failed: What ended the watching early, or None.
        overflows: Step that the scaler skipped → names of the parameters whose gradients were not
            finite; the last thousand. Those since the last look are there once it is closed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: "Optimizer | Iterable[Optimizer]",
        every: int,
        to: "str | Path | None",
        sinks: Sequence[Sink],
        *,
        selector: Selector,
        wanted: Wanted,
        budget: float | None,
        on_alarm: OnAlarm,
        scaler: Any,
        step: int,
        resume: bool,
    ) -> None:
        self._model, self._selector = model, selector
        self._optimizers = _optimizers(optimizer, model)
        self._counts = {id(o): step for o in self._optimizers}
        self._on_alarm = on_alarm
        self.alarms: list[Alarm] = []
        self.failed: BaseException | None = None
        self.governor = Governor(every, budget)
        self.overflows: dict[int, tuple[str, ...]] = {}
        self._judge = Judge()
        self._unheard: list[Alarm] = []
        self._observed, self._first_step, self._norms_until = 0, step, step
        self._waiting: set[int] = set()  # optimizers that the open look has not seen step
        self._parts: list[Part] = []
        self._looking_at: int | None = None
        self._pending: _Pending | None = None
        self._resumed_at: float | None = None  # when training went on after our last work
        self._trained = 0.0  # seconds that it took up to then, since the last step
        self._logged_since = 0  # numbers since the last step
        self._handles: dict[int, Any] = {}
        self._afters: dict[int, Any] = {}  # post-hooks, which come and go
        self._retired: list[Any] = []
        self._unwrap: Callable[[], None] = lambda: None
        self._sinks: list[Sink] = []
        self._store: Store | None = None
        self._rows: list[int] = []  # the entries' rows in the database
        self._entries: list[Entry] = []
        self._walked: object = None  # names and identities as of the last walk
        self._described: list[Entry] = []  # the entries that the database knows
        self._shared = any(is_dtensor(p) for p in model.parameters())
        self._wanted = dataclasses.replace(wanted, shared=self._shared)
        if self._shared:  # what one rank checks and another does not could not be added up
            self.governor.agree(step)
        self._find()
        self._writes = _is_rank_0()
        if self._writes and to is not None:
            meta = {"every": every, "budget": budget, **({"begins_after": step} if step else {})}
            self._store = Store(to, meta=meta, resume=resume)
            self._store.steps = step
        self._describe()
        self._sinks = list(sinks) if self._writes else []
        hook = self._before if self._writes or self._shared else self._only_count
        self._handles = {id(o): o.register_step_pre_hook(hook) for o in self._optimizers}
        if scaler is not None:
            self._unwrap = listen(scaler, self._skipped, self._unscaled)

    def __enter__(self) -> "Watcher":
        """The watcher itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the watch."""
        self.close()

    @property
    def step(self) -> int:
        """Optimizer steps so far, those before the watch included."""
        return max(self._counts.values())

    @property
    def path(self) -> Path | None:
        """The run database; None where there is none."""
        return self._store.path if self._store else None

    def run(self) -> Run:
        """What was recorded so far, read back from the database.

        Raises:
            LearnablesError: The watcher writes no database.
        """
        if self._store is None:
            raise LearnablesError("this watcher writes no run database", found="to=None")
        self._store.flush()
        return Run(self._store.path)

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name: a loss, an accuracy.

        Raises:
            ArgumentError: ``step`` is no whole number, or there is something among ``values`` that
                is none: a mistake of the caller's, as no failure of ours is.
        """
        step = require_whole(step, "step", least=0)
        with self._charged():
            plain = plain_numbers(values)
        with self._charged(), self._failing_open():
            self._logged_since += 1
            if self._logged_since > 30 and step > self.step + 30 and self._handles:
                self._raise(self._judge.silent(step, self.step))
            if self._store:
                self._store.steps = self.step
                self._store.add_scalars(step, plain)
            for sink in self._sinks:
                sink.scalars(step, plain)

    def flush(self) -> None:
        """Write what waits: the numbers of the last second, and the last look.

        Called before a checkpoint is saved, so that a run that is killed and goes on from there
        lacks nothing in its record. A look that several ranks share waits on for the next: they
        have to read it at the same step.
        """
        with self._charged(), self._failing_open():
            if not self._shared:
                self._drain(wait=True)
            if self._store:
                self._store.flush()

    def log_table(self, name: str, array: "Array | Tensor", step: int) -> None:
        """Record an array, e.g. a confusion matrix or an embedding, as it is at this step."""
        self._log_artifact(step, name, "table", lambda: table(array))

    def log_images(
        self, name: str, array: "Array | Tensor", labels: Sequence[str], step: int
    ) -> None:
        """Record images, uint8 of shape (N, H, W, C) with C 1 or 3, and one label for each."""
        self._log_artifact(step, name, "images", lambda: images(array, labels))

    def log_document(self, name: str, value: object, step: int = 0) -> None:
        """Record a JSON value: the configuration (``"config"``), an audit report (``"audit"``).

        Text that is JSON already, such as what ``report.to_json()`` returns, is kept as it is.
        """
        self._log_artifact(step, name, "document", lambda: document(value))

    def close(self) -> None:
        """End the watch: write what is pending, take the hooks off, say what it cost."""
        with self._failing_open():
            self._finish()
            self._drain(wait=True)
            if self._handles and self._writes:
                self._tell_last_overflows()
                self._say_how_it_went()
        with self._failing_open():  # what waits is written now, and a sink may write as it closes
            self._let_go()
        for optimizer in self._optimizers:
            self._remove_after(optimizer)
        retired, self._retired = self._retired, []
        for handle in retired:
            handle.remove()
        self._announce()

    # --- inside the optimizer's step --------------------------------------------------------------

    def _only_count(self, optimizer: Optimizer, *_: object) -> None:
        self._counts[id(optimizer)] += 1

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> "_Step | None":
        if torch.compiler.is_compiling() or not self._handles:
            return None
        self._remove_after(optimizer)
        begun = time.perf_counter()
        if self._resumed_at is not None:
            self.governor.stepped(self._trained + begun - self._resumed_at)
        self._trained = 0.0
        changed: _Step | None = None
        looks = checks = False
        with self._failing_open(), torch.no_grad():
            if not self._shared:  # ranks that share a look must read it at the same step
                self._drain()
            self._counts[id(optimizer)] += 1
            self._logged_since = 0
            looks = self._opens(optimizer)
            checks = looks or self.governor.watches(self._counts[id(optimizer)])
            if checks:
                changed = self._look(optimizer, args, kwargs, looks, begun)
            else:
                self._note_overflow(optimizer, consumption(optimizer))
        self._resumed_at = time.perf_counter()
        if not checks:  # what asking whether to look took
            self.governor.wrote(self._resumed_at - begun)
        self._announce()
        return changed

    def _opens(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer's step belongs to a look; opens one where it is time."""
        key = id(optimizer)
        if self._looking_at is not None and key not in self._waiting:
            self._finish()  # somebody steps again, so who is still waited for does not step now
        ahead = max((n for k, n in self._counts.items() if k != key), default=-1)
        count = self._counts[key]
        if self._looking_at is None and count > ahead:
            if self._shared and count % self.governor.every == 0:
                self._drain(wait=True)
            if self.governor.due(count):
                self._looking_at, self._waiting = count, set(self._counts)
                self._find()
                self._describe()
        return self._looking_at is not None

    def _look(
        self,
        optimizer: Optimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        looks: bool,
        begun: float,
    ) -> "_Step | None":
        """Look before the step, with ``looks``, or only check; arrange to do so after it."""
        step, held = self._counts[id(optimizer)], self._held[id(optimizer)]
        closure = _closure(args, kwargs)
        if closure is None:
            self._check_gradients(step, optimizer, held)
        part: Part | None = None
        if looks:
            if not self._parts and self._rest:
                self._parts.append(leftover(self._rest, self._wanted))
            part = begin(optimizer, held.entries, self._wanted)
            if not self._is_last(optimizer):
                part.stage += ", before other hooks"
            self._parts.append(part)

        def after(optimizer: Optimizer, *_: object) -> None:
            self._after(optimizer, held, step, part, spent)

        # Registered only now, so that it runs after everybody else's post-hooks: the update then
        # includes what they project. It is taken off before the next step and not in itself,
        # because torch walks the dict of hooks meanwhile, and would raise.
        self._afters[id(optimizer)] = optimizer.register_step_post_hook(after)
        spent = time.perf_counter() - begun
        if closure is None:
            return None

        def wrapped() -> Any:
            """Optimizers that ask for their gradients: these are there at the closure's end."""
            loss = closure()
            with self._failing_open(), torch.no_grad():
                self._check_gradients(step, optimizer, held)
                if part is not None:
                    read(part, self._wanted, weights=False)
                    part.stage = "closure"
            return loss

        return _with_closure(args, kwargs, wrapped)

    def _after(
        self, optimizer: Optimizer, held: "_Held", step: int, part: Part | None, spent: float
    ) -> None:
        begun = time.perf_counter()
        if self._resumed_at is not None:
            self._trained += begun - self._resumed_at
        with self._failing_open(), torch.no_grad():
            if not self._handles:
                return
            if not self._is_last(optimizer):
                make_last_pre_hook(optimizer, self._handles[id(optimizer)])
            self._sighted(self._sentinel.after(step, held.indices, self._values(held)))
            if part is not None:
                complete(part, self._wanted)
                self._waiting.discard(id(optimizer))
                if not self._waiting:
                    self._finish()
        self._resumed_at = time.perf_counter()
        cost = spent + self._resumed_at - begun
        (self.governor.checked if part is None else self.governor.looked)(cost)
        self._announce()

    def _is_last(self, optimizer: Optimizer) -> bool:
        """Whether no hook but those of the watch can still change the gradient: they do not."""
        later = pre_hooks_after(optimizer, self._handles[id(optimizer)])
        return all(
            isinstance(getattr(hook, "__self__", hook), (Watcher, Stepped)) for hook in later
        )

    def _remove_after(self, optimizer: Optimizer) -> None:
        handle = self._afters.pop(id(optimizer), None)
        if handle is not None:
            handle.remove()

    def _check_gradients(self, step: int, optimizer: Optimizer, held: "_Held") -> None:
        weights, gradients = self._values(held), self._gradients(held)
        how = consumption(optimizer)
        self._sighted(self._sentinel.before(step, held.indices, weights, gradients, how))

    def _gradients(self, held: "_Held") -> list[Tensor | None]:
        gradients = [p.grad for p in held.params]
        if self._shared:
            return [None if g is None else own_share(g) for g in gradients]
        return gradients

    def _note_overflow(self, optimizer: Optimizer, how: Consumption | None = None) -> None:
        """Keep whose gradients are not finite where a scaler skips the step, looked at or not."""
        if how is None or how.overflow is not None:
            held, step = self._held[id(optimizer)], self._counts[id(optimizer)]
            self._sentinel.overflow(step, held.indices, self._gradients(held), how)

    def _unscaled(self, optimizer: Any) -> None:
        """The scaler has divided the gradients, and somebody may clip them before they are used."""
        key = id(inside(optimizer))
        if key not in self._counts or not self._handles or not (self._writes or self._shared):
            return
        if not self.governor.watches(self._counts[key] + 1):
            return
        begun = time.perf_counter()
        with self._failing_open(), torch.no_grad():
            held = self._held[key]
            self._sentinel.unscaled(self._counts[key] + 1, held.indices, self._gradients(held))
        cost = time.perf_counter() - begun
        self.governor.checked(cost)
        if self._resumed_at is not None:
            self._resumed_at += cost

    def _values(self, held: "_Held") -> list[Tensor]:
        return [own_share(p) for p in held.params] if self._shared else held.params

    def _skipped(self, optimizer: Optimizer) -> None:
        """The scaler found an overflow and did not call the optimizer's step."""
        if id(optimizer) not in self._counts or not self._handles:
            return
        begun = time.perf_counter()
        with self._failing_open(), torch.no_grad():
            self._counts[id(optimizer)] += 1
            if not (self._writes or self._shared):
                return
            self._note_overflow(optimizer)
            if self._opens(optimizer):
                part = begin(optimizer, self._held[id(optimizer)].entries, self._wanted)
                part.snapshot = []
                part.stage = "step, skipped by the scaler"
                part.skipped = True
                self._parts.append(part)
                self._finish()
                self.governor.looked(time.perf_counter() - begun)
            else:
                self.governor.wrote(time.perf_counter() - begun)

    def _finish(self) -> None:
        """Pack the open look and send it on its way to the host."""
        if self._looking_at is not None and self._parts:
            self._drain(wait=True)
            packed = Packed(
                self._parts,
                len(self._entries),
                self._sentinel,
                self.governor.clocks(),
                self._shared,
                self._first_step,
            )
            names = tuple(entry.name for entry in self._entries)
            self._pending = _Pending(self._looking_at, packed, names, self._rows)
        self._looking_at, self._parts, self._waiting = None, [], set()
        if not self._shared:
            self._drain()

    def _drain(self, wait: bool = False) -> None:
        """Take in the look that has arrived on the host, if one has."""
        if self._pending is None or not (wait or self._pending.packed.ready):
            return
        sent, self._pending = self._pending, None
        arrived = sent.packed.read()
        if self._shared:
            self.governor.agree(sent.step, arrived.clocks)
        if not self._writes:
            return
        world = torch.distributed.get_world_size() if self._shared else 1
        for sighting in sightings(arrived.first, world, self._first_step):
            self._sighted(sighting)
        norms = np.full(sent.step - self._norms_until, np.nan, np.float32)
        for step, square in zip(arrived.steps, arrived.squares, strict=True):
            if step > self._norms_until:
                norms[step - self._norms_until - 1] = math.sqrt(square) if square >= 0 else math.nan
        self._norms_until = sent.step
        observation = Observation(
            step=sent.step,
            time=time.time(),
            names=sent.names,
            stage=sent.packed.stage,
            skipped=arrived.skipped,
            scale=arrived.scale,
            every=self.governor.every,
            seconds=self.governor.spent,
            rows=arrived.rows,
            columns=arrived.columns,
            norms=norms,
            skips=arrived.skips,
            overflows=arrived.overflows,
        )
        self._observed += 1
        self._blame(sent.names, arrived.overflows)
        if self._store:
            self._store.steps = self.step
            self._store.add_observation(observation, sent.rows)
        for sink in self._sinks:
            sink.observation(observation)
        self._raise(self._judge(observation))

    def _blame(self, names: Sequence[str], rows: Mapping[int, Sequence[int]]) -> None:
        self.overflows.update({step: tuple(names[i] for i in at) for step, at in rows.items()})
        for step in list(self.overflows)[:-_MOST_OVERFLOWS]:
            del self.overflows[step]

    def _tell_last_overflows(self) -> None:
        """Those after the last look; of shards no rank knows them alone, and some may be gone."""
        if self._shared or not self._sentinel.holds_overflows:
            return
        kept = self._sentinel.take().overflows.tolist()
        _, rows = overflows(kept, len(self._entries))
        names = [entry.name for entry in self._entries]
        self._blame(names, rows)
        if self._store and rows:
            said = {str(step): [names[i] for i in at] for step, at in rows.items()}
            self._store.add_artifact(self.step, OVERFLOWS, "document", document(said))

    # --- alarms, failures, the end ----------------------------------------------------------------

    def _sighted(self, sighting: Sighting | None) -> None:
        if sighting is not None:
            self._raise(self._judge.sighted(sighting, [entry.name for entry in self._entries]))

    def _raise(self, alarms: Iterable[Alarm]) -> None:
        for alarm in alarms:
            self.alarms.append(alarm)
            self._unheard.append(alarm)
            if self._store:
                self._store.add_alarm(alarm)
            for sink in self._sinks:
                sink.alarm(alarm)

    def _announce(self) -> None:
        """Tell the caller's function; outside the guard, because what it raises is meant.

        Raises:
            AlarmRaised: It is an error, and the caller said "stop".
        """
        unheard, self._unheard = self._unheard, []
        for alarm in unheard:
            if self._on_alarm == "stop":
                if alarm.severity == "error":
                    raise AlarmRaised(**alarm.parts())
            elif self._on_alarm is not None:
                self._on_alarm(alarm)

    @contextlib.contextmanager
    def _charged(self) -> Iterator[None]:
        """What the caller's own records cost is watching, and no training."""
        begun = time.perf_counter()
        yield
        cost = time.perf_counter() - begun
        self.governor.wrote(cost)
        if self._resumed_at is not None:
            self._resumed_at += cost

    @contextlib.contextmanager
    def _failing_open(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self.failed is not None:
            return
        self.failed = error
        with contextlib.suppress(Exception):
            self._let_go()
        try:
            warn(
                "watching has failed and is off; training goes on as without it",
                where=f"step {self.step}",
                found=f"{type(error).__name__}: {error}",
            )
        except Warning as warning:  # `-W error` is no wish to lose a training to its watcher
            print(warning, file=sys.stderr)

    def _let_go(self) -> None:
        """Stop looking. The hooks stay, and do nothing: this may be inside one of them."""
        self._retired += self._handles.values()
        self._handles = {}
        self._unwrap()
        self._looking_at, self._parts, self._pending = None, [], None
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close()
        if self._store:
            self._store.close()

    def _log_artifact(self, step: int, name: str, kind: str, make: Callable[[], bytes]) -> None:
        # A wrong argument is the caller's mistake, and he should hear of it.
        require_text(name, "name")
        step = require_whole(step, "step", least=0)
        data = make()
        with self._charged(), self._failing_open():
            if self._store and self.failed is None:
                self._store.add_artifact(step, name, kind, data)

    def _say_how_it_went(self) -> None:
        governor, done = self.governor, self.step - self._first_step
        if self._store and governor.elapsed:
            self._store.steps = self.step
            self._store.add_meta({"overhead": governor.overhead})
        if not done:
            said = "no optimizer step was seen; a step that is compiled as a whole hides from hooks"
        elif governor.budget is None or not governor.elapsed:
            return
        else:
            looks = self._observed
            chose = f", one every {round(done / looks)}" if looks > 1 else ""
            early = "; the first five come as asked" if governor.overhead > governor.budget else ""
            said = (
                f"{looks} look{'s' * (looks != 1)} in {done} steps{chose}, asked for every "
                f"{governor.every}; cost {governor.overhead:.2%} of the training time "
                f"(budget {governor.budget:.2%}{early})"
            )
        print(f"watch: {said}; {self.path or 'no database'}", file=sys.stderr)

    # --- who is watched ---------------------------------------------------------------------------

    def _find(self) -> None:
        """Walk the model and the optimizers again, if parameters have come or gone."""
        walked = _walk(self._model, self._optimizers)
        if walked == self._walked:
            return
        self._walked = walked
        holds = {
            id(o): {p for group in o.param_groups for p in group["params"]}
            for o in self._optimizers
        }
        held = set().union(*holds.values())
        every = [e for e in entries(self._model) if e.trainable or e.param in held]
        found = [Entry(e.param, e.places, i) for i, e in enumerate(pick(every, self._selector))]
        self._entries, before = found, self._entries
        holder = {name: e for e in found for name in e.names}
        for old in before:
            kept = [name for name in old.names if name in holder]
            if len({holder[name].index for name in kept}) > 1:
                self._raise(self._judge.untied(self.step, kept))
        self._held = {
            key: _Held([e for e in found if e.param in mine]) for key, mine in holds.items()
        }
        self._rest = [e for e in found if e.param not in held]
        self._judge.frozen = frozenset(e.name for e in found if not e.trainable)
        device = found[0].param.device
        self._sentinel = Sentinel(len(found), device, self._shared)

    def _describe(self) -> None:
        if self._store and self._described is not self._entries:
            self._described = self._entries
            groups = {p: g for o in self._optimizers for g in o.param_groups for p in g["params"]}
            facts = [_facts(entry, groups.get(entry.param)) for entry in self._entries]
            self._rows = self._store.add_parameters(facts)


def _walk(model: nn.Module, optimizers: Iterable[Optimizer]) -> list[object]:
    """Who is where, by identity: equal as long as no parameter comes, goes, moves or is renamed."""
    named = model.named_parameters(remove_duplicate=False)
    groups = itertools.chain.from_iterable(o.param_groups for o in optimizers)
    return [
        *((name, _Same(p), p.requires_grad, p.device) for name, p in named),
        *(_Same(p) for group in groups for p in group["params"]),
    ]


class _Same:
    """Compares what it holds by identity; held, so that nothing new gets the same identity."""

    __slots__ = ("held",)

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.held is self.held

    __hash__ = object.__hash__


class _Held:
    """The entries of one optimizer; lists at hand, because the check needs them at every step."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.indices = [entry.index for entry in entries]
        self.params: list[Tensor] = [entry.param for entry in entries]


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A look on its way to the host, and what it is about."""

    step: int
    packed: Packed
    names: tuple[str, ...]
    rows: list[int]


def _closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Callable[[], Any] | None":
    """What ``optimizer.step`` was given to evaluate the model with."""
    found: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
    return found if callable(found) else None


def _with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any]
) -> "_Step":
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}


def _is_rank_0() -> bool:
    distributed = torch.distributed
    return not (
        distributed.is_available() and distributed.is_initialized() and distributed.get_rank()
    )


def _optimizers(optimizer: "Optimizer | Iterable[Optimizer]", model: nn.Module) -> list[Optimizer]:
    if isinstance(optimizer, Mapping):
        optimizer = optimizer.values()
    many = isinstance(optimizer, Iterable) and not hasattr(optimizer, "param_groups")
    found = [steppable(o) for o in (optimizer if many else [optimizer])]  # type: ignore[union-attr]
    if not found:
        raise ArgumentError(
            "no optimizer is there to be watched",
            where="optimizer",
            found=describe(optimizer),
            wanted="a torch.optim.Optimizer, or several",
            mend="optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3))",
        )
    held = {p for o in found for group in o.param_groups for p in group["params"]}
    if held.isdisjoint(model.parameters()):
        raise LearnablesError(
            "the optimizer holds no parameter of this model",
            where="optimizer",
            found=f"{len(held)} parameters, none of the {len(list(model.parameters()))} of the "
            "model: those of another, copies, or those that there were before it was sharded",
            wanted="the optimizer that trains the model",
            mend="optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3))",
        )
    return list(dict.fromkeys(found))  # one that is there twice steps once


def _facts(entry: Entry, group: Mapping[str, Any] | None) -> dict[str, object]:
    """What the database says of a parameter; its policy is what its group really does."""
    policy: dict[str, object] = {"kind": kind_of(entry).name}
    if group is None:
        policy["optimizer"] = "in no group"
    else:
        named = ("weight_decay", "lr")
        policy |= {k: _plain(group[k]) for k in named if k in group}
    for place in reversed(entry.places):
        for statement in (place.note.declared, *place.note.annotated):
            if statement is not None:
                fields = {f"declared {k}": repr(v) for k, v in statement.fields.items()}
                policy |= {**fields, "declared at": statement.at}
    return {
        "name": entry.name,
        "names": list(entry.names),
        "shape": list(entry.shape),
        "dtype": dtype_name(entry.dtype),
        "device": str(entry.param.device),
        "numel": entry.param.numel(),
        "trainable": entry.trainable,
        "policy": policy,
    }


def _plain(value: Any) -> object:
    if isinstance(value, Tensor):  # a learning rate on a device is not waited for
        return value.item() if value.device.type == "cpu" else "on the device"
    return value if isinstance(value, (int, float, bool)) else repr(value)
