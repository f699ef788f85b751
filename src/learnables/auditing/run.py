"""Run an audit: look once, observe some iterations, put everything back, let every rule reason."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import is_uninitialised, local, without_compiling
from learnables.arguments import (
    describe,
    optimizers_in,
    require_function,
    require_module,
    require_whole,
)
from learnables.auditing.discover import Everything, optimizers_alive
from learnables.auditing.evidence import Crash, Evidence, Stage
from learnables.auditing.experiments import PROBES, Experiments, check_probes, experiment
from learnables.auditing.intent import Intent, Loaded
from learnables.auditing.lookout import Lookout
from learnables.auditing.memory import Memory
from learnables.auditing.observe import SNAPSHOT_BUDGET, Observer
from learnables.auditing.places import line_of
from learnables.auditing.report import Report, parameter_rows
from learnables.auditing.rule import Finding, Rule, SkipRule, load_rules, patterns_in, picks
from learnables.auditing.silence import silences
from learnables.auditing.survey import Survey, survey
from learnables.auditing.together import together
from learnables.errors import ArgumentError

Patterns = Sequence[str]


def audit(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    step: Callable[[], Any] | None = None,
    *,
    optimizers: Iterable[Optimizer] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    scaler: Any = None,
    scheduler: Any = None,
    ddp: nn.Module | None = None,
    copies: Mapping[str, Any] | None = None,
    batch: Any = None,
    loaded: Loaded | None = None,
    intent: Intent | None = None,
    select: Patterns | None = None,
    ignore: Patterns | None = None,
    steps: int = 4,
    probes: Collection[str] = (),
) -> Report:
    """Find every parameter that does not train as its author thinks, and say why.

    Without ``step`` only what can be seen without running is judged. With it, ``step`` is run
    ``steps`` times under observation; afterwards the model, its buffers and gradients, optimizers,
    scaler, scheduler, copies, everything in the closure of ``step`` and the random states are bit
    for bit as before. What could not be put back is in ``report.not_restored``.

    Args:
        model: The model, bare or wrapped.
        optimizer: Its optimizer.
        step: Runs one complete training iteration and returns the loss.
        optimizers: All optimizers, where there are several. More are found in the closure of
            ``step`` and by watching who steps.
        modules: Name → module outside the model that has parameters too, e.g. a criterion.
        scaler: The gradient scaler.
        scheduler: The learning-rate scheduler.
        ddp: The wrapper, where ``model`` is the bare module.
        copies: Name → state dict or module that is meant to be an independent copy (EMA, best).
        batch: What the model is called with, a tensor or a tuple or dict of arguments, samples
            along the first dimension: whether its outputs mix them is judged then.
        loaded: What was loaded before.
        intent: What the author meant, where the model does not declare it.
        select: Only rules with these codes, prefixes of codes or names.
        ignore: No rules with these.
        steps: How many iterations to observe.
        probes: Experiments to make besides. ``"gradient"`` moves the parameters along their
            gradients and compares how the loss changes; it needs a step that repeats, and takes
            two iterations for each 8 parameters. ``"checkpoint"`` loads the state dict into a
            changed copy of the model and compares.

    Returns:
        The report.

    Raises:
        ArgumentError: ``model`` is no module, or another argument is not of its kind.
        LearnablesError: ``steps`` is not positive, or there is no such probe or rule.

    Example:
        >>> import learnables as ln
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD([model.weight], lr=0.1)
        >>> print(ln.audit(model, optimizer).findings[0])
        LRN201 trainable parameter is in no optimizer group
          where: bias
          found: shape (1,), float32, cpu; in 0 of 1 groups
          wanted: exactly one group
          mend: optimizer.add_param_group({'params': [model.get_parameter('bias')]})

    Cost:
        ``steps`` plain iterations, each about 1.2× as long while traced, and two copies of the
        model; see benchmarks/audit.py.
    """
    require_module(model)
    check_probes(probes)
    _require_kinds(step=step, modules=modules, ddp=ddp, copies=copies, loaded=loaded, intent=intent)
    steps, select, ignore = _understood(steps, select, ignore)
    given = _all_of(optimizer, optimizers)
    actors = [a for a in (scaler, scheduler, ddp, *_values(copies)) if a is not None]
    found = survey(model, given, step, modules or {}, [a for a in (scaler, scheduler, ddp) if a])
    asked = bool(probes) or batch is not None
    if step is None and not asked:
        evidence = _still(found, intent, loaded, copies, batch)
        return judge(together(evidence, SNAPSHOT_BUDGET), select, ignore)
    roots: dict[str, Any] = {"model": model, **dict(modules or {}), "step": step}
    roots |= {seen.name: seen.optimizer for seen in found.optimizers}
    roots |= {f"{type(a).__name__} {i}": a for i, a in enumerate(actors)}
    memory = Memory(roots)
    try:
        if step is None:
            evidence = _still(found, intent, loaded, copies, batch)
        else:
            evidence = _observed(found, step, steps, intent, loaded, copies, batch)
        if asked and evidence.crash is None:
            params = [entry.param for entry in evidence.trainable()]
            with without_compiling():
                memory.restore()
                made = experiment(probes, model, params, step, batch, memory.restore)
            evidence = replace(evidence, experiments=made)
        elif asked:
            reasons = dict.fromkeys(PROBES, "a step that does not raise")
            evidence = replace(evidence, experiments=Experiments(reasons=reasons))
    finally:
        not_restored = memory.restore()
    return judge(together(evidence, SNAPSHOT_BUDGET), select, ignore, not_restored)


_KINDS: dict[str, tuple[type, str]] = {
    "step": (Callable, "lambda: model(batch).mean()"),  # type: ignore[dict-item]
    "ddp": (nn.Module, "wrapped_model"),
    "modules": (Mapping, "{'criterion': criterion}"),
    "copies": (Mapping, "{'ema': ema_model}"),
    "loaded": (Loaded, "ln.Loaded(state_dict=state)"),
    "intent": (Intent, "ln.Intent(frozen=['backbone.*'])"),
}


def _require_kinds(**given: object) -> None:
    for name, value in given.items():
        kind, example = _KINDS[name]
        if value is not None and not isinstance(value, kind):
            raise ArgumentError(
                f"{name} is of another kind",
                where=name,
                found=describe(value),
                wanted=f"a {kind.__name__}, or None",
                mend=f"{name}={example}",
            )


def _understood(
    steps: int, select: Sequence[str] | None, ignore: Sequence[str] | None
) -> tuple[int, tuple[str, ...] | None, tuple[str, ...] | None]:
    return (
        require_whole(steps, "steps", least=1),
        None if select is None else patterns_in(select),
        None if ignore is None else patterns_in(ignore, "ignore"),
    )


def _all_of(optimizer: Optimizer | None, optimizers: Iterable[Optimizer] | None) -> list[Optimizer]:
    given = [*optimizers_in(optimizer), *optimizers_in(optimizers)]
    return list({id(o): o for o in given}.values())


def _values(mapping: Mapping[str, Any] | None) -> list[Any]:
    return list((mapping or {}).values())


def _observed(
    found: Survey,
    step: Callable[[], Any],
    steps: int,
    intent: Intent | None,
    loaded: Loaded | None,
    copies: Mapping[str, Any] | None,
    batch: Any,
) -> Evidence:
    crash = None
    with without_compiling(), Observer(found) as observer:
        for i in range(steps):
            observer.begin()
            try:
                loss = step()
            except Exception as error:  # whatever the user's code raises is a finding
                crash = Crash(i, error, line_of(error))
                break
            observer.end(loss)
    return _evidence(observer, crash, intent, loaded, copies, batch)


def _still(
    found: Survey,
    intent: Intent | None,
    loaded: Loaded | None,
    copies: Mapping[str, Any] | None,
    batch: Any,
) -> Evidence:
    stage = Stage.OPTIMIZER if found.optimizers else Stage.MODEL
    return Evidence(
        first=_values_now(found),
        stage=stage,
        model=found.model,
        entries=tuple(found.entries),
        modules={**found.modules, **found.found_modules},
        found_modules=frozenset(found.found_modules),
        held=tuple(found.held),
        optimizers=tuple(found.optimizers),
        intent=intent or Intent(),
        loaded=loaded,
        copies=dict(copies or {}),
        scalers=tuple(found.scalers),
        schedulers=tuple(found.schedulers),
        wrappers=tuple(found.wrappers),
        batch=batch,
    )


def _values_now(found: Survey) -> dict[Tensor, Tensor]:
    """Nothing runs between this look and the verdict, so that the values need no copy."""
    return {
        tensor: local(tensor.detach())
        for tensor in (*(e.param for e in found.entries), *(h.tensor for h in found.held))
        if tensor.device.type != "meta" and not is_uninitialised(tensor)
    }


def _evidence(
    observer: Observer,
    crash: Crash | None,
    intent: Intent | None,
    loaded: Loaded | None,
    copies: Mapping[str, Any] | None,
    batch: Any,
) -> Evidence:
    still = _still(observer.survey, intent, loaded, copies, batch)
    kinds = {event.kind for event in observer.events}
    stage = still.stage
    if "backward" in kinds:
        stage = Stage.BACKWARD
    if "step" in kinds:
        stage = Stage.STEP
    first = {s.tensor: s.first for s in observer.slots if s.first is not None}
    last = {s.tensor: s.last for s in observer.slots if s.last is not None}
    return replace(
        still,
        stage=stage,
        events=tuple(observer.events),
        iterations=observer.iteration,
        losses=tuple(observer.losses),
        looks=observer.looks(),
        endings=observer.endings,
        shifts=observer.shifts,
        written=observer.trace.written if observer.trace is not None else {},
        removed=frozenset(observer.trace.removed if observer.trace is not None else ()),
        functions=observer.functions,
        promotions=observer.promotions,
        batch_size=observer.batch_size,
        called=observer.called,
        first=first,
        last=last,
        crash=crash,
    )


# -- judging ------------------------------------------------------------------------------------


def judge(
    evidence: Evidence,
    select: Patterns | None = None,
    ignore: Patterns | None = None,
    not_restored: Sequence[str] = (),
) -> Report:
    """Let every rule that may judge read the evidence."""
    found: list[tuple[Rule, Finding]] = []
    silenced: list[tuple[Finding, str]] = []
    skipped: dict[str, str] = {}
    for rule in load_rules().values():
        if select is not None and not picks(rule, tuple(select)):
            continue
        if ignore is not None and picks(rule, tuple(ignore)):
            continue
        if rule.needs > evidence.stage:
            skipped[rule.code] = f"needs {_NEEDED[rule.needs]}"
            continue
        meant = _meant(rule, evidence)
        try:
            own = [
                replace(f, code=rule.code, name=rule.name, severity=f.severity or rule.severity)
                for f in rule.check(evidence)
            ]
        except SkipRule as reason:
            skipped[rule.code] = str(reason)
            continue
        for finding in own:
            why = next((r for names, r in meant if names.intersection(finding.where)), None)
            if why is None:
                found.append((rule, finding))
            else:
                silenced.append((finding, why))
    return Report(
        merged(_first_causes(found)),
        skipped=skipped,
        parameters=parameter_rows(evidence),
        not_restored=not_restored,
        silenced=silenced,
        iterations=evidence.iterations,
        crashed=evidence.crash.error if evidence.crash else None,
    )


_NEEDED = {
    Stage.OPTIMIZER: "an optimizer",
    Stage.BACKWARD: "an observed backward: pass step=",
    Stage.STEP: "an observed optimizer step: pass step=",
}


def _meant(rule: Rule, evidence: Evidence) -> list[tuple[frozenset[str], str]]:
    return [
        (silence.names(evidence.entries), silence.reason)
        for silence in silences()
        if picks(rule, (silence.code,))
    ]


def _first_causes(found: Sequence[tuple[Rule, Finding]]) -> Iterator[Finding]:
    """Drop, parameter by parameter, what another rule's finding explains."""
    for rule, finding in found:
        causes = [
            cause
            for other, cause in found
            if other is not rule and _subsumes(other, rule) and not _subsumes(rule, other)
        ]
        explained = {name for cause in causes for name in cause.where}
        left = [name for name in finding.where if name not in explained]
        of_everything = any(not cause.where for cause in causes)
        if not of_everything and (left or (not finding.where and not causes)):
            yield replace(finding, where=left)


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """One finding where the same thing is wrong at the same line with several parameters."""
    alike: dict[tuple[object, ...], list[Finding]] = {}
    for f in findings:
        alike.setdefault((f.code, f.severity, f.what, f.wanted, f.location), []).append(f)
    return [_one(group) for group in alike.values()]


def _one(findings: list[Finding]) -> Finding:
    first = findings[0]
    if len(findings) == 1:
        return first
    found = list(dict.fromkeys(f.found for f in findings if f.found))
    more = f"; and {len(found) - 1} more like it" if len(found) > 1 else ""
    return replace(
        first,
        where=list(dict.fromkeys(name for f in findings for name in f.where)),
        found=f"{first.found}{more}",
        mend="\n".join(dict.fromkeys(f.mend for f in findings if f.mend)),
    )


def _subsumes(cause: Rule, effect: Rule) -> bool:
    return any(effect.code.startswith(prefix) for prefix in cause.subsumes)


# -- around the user's own loop -----------------------------------------------------------------


def observe(
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    *,
    steps: int = 4,
    optimizers: Iterable[Optimizer] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    scaler: Any = None,
    scheduler: Any = None,
    ddp: nn.Module | None = None,
    copies: Mapping[str, Any] | None = None,
    loaded: Loaded | None = None,
    intent: Intent | None = None,
    select: Patterns | None = None,
    ignore: Patterns | None = None,
    on_report: Callable[[Report], None] | None = None,
) -> "Observation":
    """The same audit around your own loop; it changes nothing.

    A context manager. ``.report`` is there after ``steps`` iterations, or when the ``with`` is
    left; from then on the loop runs as if nothing had been.

    Args:
        model: The model; found by itself when not given, from what the first step updates.
        optimizer: Likewise.
        steps: How many iterations to observe.
        optimizers: As for `ln.audit`, like all that follow.
        modules: Name → module outside the model that has parameters too.
        scaler: The gradient scaler.
        scheduler: The learning-rate scheduler.
        ddp: The wrapper, where ``model`` is the bare module.
        copies: Name → state dict or module that is meant to be an independent copy.
        loaded: What was loaded before.
        intent: What the author meant.
        select: Only rules with these codes, prefixes of codes or names.
        ignore: No rules with these.
        on_report: Called once with the report, as soon as it is there.

    Returns:
        The context manager.

    Raises:
        ArgumentError: An argument is not of its kind.
        LearnablesError: There is no such rule.

    Example:
        >>> import learnables as ln
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with ln.observe() as seen:
        ...     for _ in range(4):
        ...         optimizer.zero_grad()
        ...         model(torch.ones(2, 4)).sum().backward()
        ...         optimizer.step()
        >>> seen.report
        <Report: clean; 2 parameters, 4 observed iterations...>
    """
    if model is not None:
        require_module(model)
    _require_kinds(modules=modules, ddp=ddp, copies=copies, loaded=loaded, intent=intent)
    if on_report is not None:
        require_function(on_report, "on_report")
    steps, select, ignore = _understood(steps, select, ignore)
    given = _all_of(optimizer, optimizers)
    actors = [a for a in (scaler, scheduler, ddp) if a is not None]

    def finish(observer: Observer) -> Report:
        if isinstance(observer.survey.model, Everything):
            for idle in optimizers_alive():
                name = f"the {type(idle).__name__} that never stepped"
                observer.survey.add_optimizer(idle, name, given=False)
        evidence = _evidence(observer, None, intent, loaded, copies, None)
        if isinstance(evidence.model, Everything):
            evidence = evidence.model.narrow(evidence)
        return judge(together(evidence, SNAPSHOT_BUDGET), select, ignore)

    return Observation(model, given, modules or {}, actors, steps, finish, on_report)


class Observation:
    """What `ln.observe` returns: open it with ``with``, read ``.report`` afterwards."""

    def __init__(
        self,
        model: nn.Module | None,
        optimizers: list[Optimizer],
        modules: Mapping[str, nn.Module],
        actors: list[Any],
        steps: int,
        finish: Callable[[Observer], Report],
        on_report: Callable[[Report], None] | None,
    ) -> None:
        self.report: Report | None = None
        self.on_failure: Callable[[Exception], None] | None = None
        self._model, self._optimizers, self._modules = model, optimizers, modules
        self._actors, self._steps, self._finish, self._on_report = actors, steps, finish, on_report
        self._open = contextlib.ExitStack()
        self._observer: Observer | None = None
        self._lookout: Lookout | None = None
        self.has_begun = False

    def __enter__(self) -> "Observation":
        """Start looking, or wait until training begins where no model was handed over."""
        if self._model is None:
            self._lookout = Lookout(self._begin_in_the_middle, self._adopt)
            self._lookout.open()
        else:
            self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop looking; write the report if that has not happened yet."""
        if self._lookout is not None:
            self._lookout.close()
        if not self.has_begun and kind is None:
            self._begin()
        self._stop(broken=kind is not None)

    def abandon(self) -> None:
        """Stop looking without a report, e.g. in a child process that inherited the patches."""
        if self._lookout is not None:
            self._lookout.close()
        self._observer = None
        self._open.close()

    @property
    def steps_missed(self) -> int:
        """Optimizer steps before there was a model to look at."""
        return 0 if self._lookout is None else self._lookout.steps

    def _begin(self, *, in_the_middle: bool = False) -> None:
        self.has_begun = True
        self._open.enter_context(without_compiling())
        model = self._model
        if model is None:
            model = Everything.alive(self._optimizers)
        found = survey(model, self._optimizers, None, self._modules, self._actors)
        self._observer = Observer(
            found,
            on_boundary=self._boundary,
            is_last=self._is_last,
            taking_turns=len(optimizers_alive()) if self._model is None else 1,
        )
        self._open.enter_context(self._observer)
        self._observer.begin(in_the_middle=in_the_middle)

    def _begin_in_the_middle(self) -> None:
        self._begin(in_the_middle=True)

    def _adopt(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        observer = self._observer
        return closure if observer is None else observer.adopt(optimizer, closure)

    def _boundary(self, may_stop: bool) -> None:
        observer = self._observer
        if observer is None:
            return
        losses = [e.details["loss"] for e in observer.happened("backward")]
        observer.end(losses[-1] if losses else None)
        if may_stop and observer.iteration >= self._wanted(observer):
            self._stop()
        else:
            observer.begin()

    def _wanted(self, observer: Observer) -> int:
        """How many iterations to observe: more where several optimizers take turns."""
        steppers: dict[int, set[int]] = {}
        for event in observer.happened("step"):
            steppers.setdefault(event.iteration, set()).add(id(event.subject))
        if not steppers:
            return self._steps
        at_once = max(map(len, steppers.values()))
        return self._steps * -(-len(set().union(*steppers.values())) // at_once)

    def _is_last(self) -> bool:
        observer = self._observer
        return observer is not None and observer.iteration + 1 >= self._wanted(observer)

    def _stop(self, *, broken: bool = False) -> None:
        """Close and judge; an iteration that an exception broke off before its step is left out."""
        observer, self._observer = self._observer, None
        if observer is None:
            return
        if observer.has_open_iteration and not (broken and not observer.has_stepped):
            losses = [e.details["loss"] for e in observer.happened("backward")]
            observer.end(losses[-1] if losses else None)
        self._open.close()
        try:
            self.report = self._finish(observer)
        except Exception as error:
            if self.on_failure is None:
                raise
            self.on_failure(error)
            return
        if self._on_report is not None:
            self._on_report(self.report)
