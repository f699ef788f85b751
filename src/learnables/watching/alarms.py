"""What deserves an alarm, judged from the observations alone.

Each sign is one line in `SIGNS`: a test over all parameters at once, and how many looks in a row it
must hold. Bounds are wide on purpose: an alarm that cries at healthy trainings is switched off.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import final

import numpy as np

from learnables.watching.alarm import Alarm
from learnables.watching.encoding import Array
from learnables.watching.observation import Observation
from learnables.watching.sentinel import Sighting

_MOST = 20  # alarms of one kind in one run: who has not looked by then does not look
_SPIKE = 30.0  # times the median gradient norm of the last steps
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class Sign:
    """Something wrong with a parameter, when it goes on for some looks.

    Attributes:
        kind: Its name.
        patience: How many looks in a row.
        test: Observation and first observation → which parameters show it, shape (P,).
        what: The sentence.
        found: Observation and row → what is seen.
        wanted: What would have been expected.
        mend: What to type; ``{name}`` is the parameter.
        of_frozen: Whether it is also a sign where no gradient is asked for.
    """

    kind: str
    patience: int
    test: Callable[[Observation, Observation], Array]
    what: str
    found: Callable[[Observation, int], str]
    wanted: str
    mend: str = ""
    of_frozen: bool = True


def _trains(o: Observation) -> Array:
    """Held by an optimizer with a learning rate above 0 (or one that cannot be read)."""
    rate = o.columns.get("lr", np.full(len(o.names), np.nan))
    held = o.rows["update"].present if "update" in o.rows else np.zeros(len(o.names), bool)
    return np.asarray(held & ~(rate == 0))


def _gradient_arrives(o: Observation) -> Array:
    if "gradient" not in o.rows:
        return np.zeros(len(o.names), bool)
    moments = o.rows["gradient"].moments
    return np.asarray((moments["count"] > 0) & (moments["zeros"] < moments["count"]))


def _moves(o: Observation) -> Array:
    moments = o.rows["update"].moments
    return np.asarray(moments["zeros"] < moments["count"])


def _column(o: Observation, name: str) -> Array:
    found = o.columns.get(name)
    return np.full(len(o.names), np.nan) if found is None else found


def _weight(o: Observation, name: str) -> Array:
    rows = o.rows.get("weight")
    return np.zeros(len(o.names)) if rows is None else rows.moments[name]


def _norm(o: Observation) -> Array:
    rows = o.rows.get("weight")
    return np.full(len(o.names), np.nan) if rows is None else rows.norm


def _said(value: float) -> str:
    return f"{value:.2g}"


SIGNS = (
    Sign(
        "dead",
        5,
        lambda o, _: _trains(o) & ~_gradient_arrives(o),
        "no gradient arrives",
        lambda o, i: "a gradient of zeros, or none, in 5 looks in a row",
        "a gradient in at least one of them",
        "print(ln.audit(model, optimizer, step))",
        of_frozen=False,
    ),
    Sign(
        "frozen",
        5,
        lambda o, _: _trains(o) & _gradient_arrives(o) & ~_moves(o) & ~_half(o),
        "the value does not move although a gradient arrives",
        lambda o, i: f"an update of zeros in 5 looks in a row, gradient {_said(_gradient(o, i))}",
        "an update that is not 0",
        "print(ln.audit(model, optimizer, step))",
    ),
    Sign(
        "rounding",
        3,
        lambda o, _: _trains(o) & (_column(o, "lost") > 0.5) & (_moves(o) | _half(o)),
        "most of the update is lost to rounding",
        lambda o, i: f"{_column(o, 'lost')[i]:.0%} of the elements with a gradient do not change",
        "less than half; a dtype with more digits, or a larger learning rate",
        "model.get_parameter({name!r}).data = model.get_parameter({name!r}).data.float()",
    ),
    Sign(
        "too-fast",
        3,
        lambda o, _: (o.step > 20) & (o.ratio > 0.5),
        "each step replaces much of the value",
        lambda o, i: f"‖update‖ / ‖weight‖ = {_said(o.ratio[i])}",
        "about 1e-4 to 1e-2",
        "ln.annotate(model, {name!r}, lr_scale=0.1)",
    ),
    Sign(
        "too-slow",
        5,
        lambda o, _: _trains(o) & _gradient_arrives(o) & _moves(o) & (o.ratio < 1e-8),
        "the steps are too small to matter",
        lambda o, i: f"‖update‖ / ‖weight‖ = {_said(o.ratio[i])}",
        "about 1e-4 to 1e-2",
        "ln.annotate(model, {name!r}, lr_scale=10.0)",
    ),
    Sign(
        "drift",
        3,
        lambda o, first: (
            (_norm(first) > 0) & ((_norm(o) > 20 * _norm(first)) | (_norm(o) < 0.02 * _norm(first)))
        ),
        "the scale has drifted far from where it began",
        lambda o, i: f"‖weight‖ = {_said(_norm(o)[i])}",
        "0.02 to 20 times the norm at the first look",
        "ln.annotate(model, {name!r}, weight_decay=True)",
    ),
    Sign(
        "saturation",
        1,
        # Only float16 has a largest number that a weight can come near to.
        lambda o, _: (_weight(o, "absmax") > _FP16_MAX / 8) & (_column(o, "digits") == 10),
        "the value is about to leave the range of its dtype",
        lambda o, i: f"|weight| up to {_said(_weight(o, 'absmax')[i])}",
        f"below {_FP16_MAX / 8:.0f} in float16",
        "model.get_parameter({name!r}).data = model.get_parameter({name!r}).data.float()",
    ),
    Sign(
        "outside",
        2,
        lambda o, _: _column(o, "defect") > 1e-3,
        "the value has left the set that was declared for it",
        lambda o, i: f"distance {_said(_column(o, 'defect')[i])}",
        "≤ 1e-3",
        "ln.attach(model, optimizer)",
    ),
)


def _gradient(o: Observation, i: int) -> float:
    return float(o.rows["gradient"].norm[i])


def _half(o: Observation) -> Array:
    return np.asarray(_column(o, "digits") < 23)


@final
class Judge:
    """Call it with each observation in turn; it yields what is new and wrong.

    Attributes:
        frozen: Names of parameters that ask for no gradient, though an optimizer holds them.
    """

    def __init__(self) -> None:
        self.frozen: frozenset[str] = frozenset()
        self._names: tuple[str, ...] = ()
        self._first: Observation | None = None
        self._row: dict[str, Array] = {}
        self._told: set[tuple[str, str]] = set()
        self._counts: dict[str, int] = {}
        self._norms: deque[float] = deque(maxlen=200)
        self._last_step = 0
        self._overflows: Counter[str] = Counter()
        self._named_skips = 0
        self._window = np.zeros(2, int)  # steps and skips not judged yet
        self._last_sighting = -(10**9)
        self._zeros: Array = np.zeros(0)
        self._kept: Array = np.zeros(0)

    def __call__(self, o: Observation) -> Iterator[Alarm]:
        """The alarms that this observation adds."""
        if o.names != self._names or self._first is None:  # parameters came or went: begin anew
            self._names, self._first = o.names, o
            self._row = {sign.kind: np.zeros(len(o.names), int) for sign in SIGNS}
            self._zeros, self._kept = _weight(o, "zeros"), np.zeros(len(o.names), int)
        yield from self._spike(o)
        yield from self._skips(o)
        self._last_step = o.step
        if o.skipped or "update" not in o.rows:
            return
        asked = np.array([name not in self.frozen for name in o.names], bool)
        with np.errstate(invalid="ignore"):
            for sign in SIGNS:
                shown = sign.test(o, self._first) & (asked | sign.of_frozen)
                row = self._row[sign.kind] = np.where(shown, self._row[sign.kind] + 1, 0)
                for i in np.flatnonzero(row == sign.patience):
                    yield from self._tell(
                        Alarm(
                            kind=sign.kind,
                            severity="warning",
                            step=o.step,
                            name=o.names[i],
                            what=sign.what,
                            found=sign.found(o, int(i)),
                            wanted=sign.wanted,
                            mend=sign.mend.format(name=o.names[i]),
                        )
                    )
        yield from self._masks(o)

    def sighted(self, sighting: Sighting, names: Sequence[str]) -> Iterator[Alarm]:
        """The alarm for a non-finite value, unless it only goes on from the last one."""
        new = sighting.step > self._last_sighting + 100
        self._last_sighting = sighting.step
        if new:
            yield from self._tell(_nonfinite(sighting, names), once=False)

    def untied(self, step: int, names: Sequence[str]) -> Iterator[Alarm]:
        """The alarm for a parameter that was one under all ``names``, and no longer is."""
        yield from self._tell(
            Alarm(
                kind="untied",
                severity="error",
                step=step,
                name=names[0],
                what="a tie is broken: names of one parameter now hold different ones",
                found=f"{' and '.join(map(repr, names))} are not the same Parameter",
                wanted="one Parameter, as when the watch began",
                mend=f"ln.tie(model, {names[1]!r}, {names[0]!r})",
            )
        )

    def silent(self, step: int, last: int) -> Iterator[Alarm]:
        """The alarm for a loop that goes on while the optimizer does not step."""
        yield from self._tell(
            Alarm(
                kind="silent",
                severity="error",
                step=last,
                name="",
                what="the loop goes on, but the watched optimizer no longer steps",
                found=f"numbers logged for step {step}, last optimizer step {last}",
                wanted="the optimizer that trains the model",
                mend="ln.watch(model, optimizer)",
            )
        )

    def _spike(self, o: Observation) -> Iterator[Alarm]:
        """A gradient far longer than those of the steps before it."""
        first = o.step - len(o.norms) + 1
        for at, norm in enumerate(o.norms.tolist()):
            usual = median(self._norms) if len(self._norms) >= 20 else None
            if usual and np.isfinite(norm) and norm > _SPIKE * usual:
                yield from self._tell(
                    Alarm(
                        kind="spike",
                        severity="warning",
                        step=first + at,
                        name="",
                        what="the gradient is far longer than usual",
                        found=f"‖gradient‖ = {_said(norm)}, {norm / usual:.0f} times the median",
                        wanted=f"below {_SPIKE:.0f} times the median of the last steps",
                        mend="torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
                    ),
                    once=False,
                )
            if np.isfinite(norm):
                self._norms.append(norm)

    def _skips(self, o: Observation) -> Iterator[Alarm]:
        for rows in o.overflows.values():
            self._overflows.update(o.names[i] for i in rows)
            self._named_skips += bool(rows)
        self._window += np.array([o.step - self._last_step, o.skips])
        steps, skips = map(int, self._window)
        if steps < 10:
            return
        self._window[:] = 0
        if skips > 0.2 * steps:
            most = self._overflows.most_common(1)
            share = f"{len(self._overflows)} of {len(o.names)} parameters"
            whose = (
                f"; in {self._named_skips} skipped steps the gradients of {share} were not finite, "
                f"this one's in {most[0][1]}"
                if most
                else ""
            )
            yield from self._tell(
                Alarm(
                    kind="skipped-steps",
                    severity="warning",
                    step=o.step,
                    name=most[0][0] if most else "",
                    what="the scaler skips many steps",
                    found=f"{skips} of the last {steps} steps{whose}",
                    wanted="a few in a thousand",
                    mend="torch.amp.GradScaler(init_scale=2.0**10)",
                )
            )

    def _masks(self, o: Observation) -> Iterator[Alarm]:
        """Exact zeros that stayed zeros for some looks are a mask; they should stay so."""
        zeros, count = _weight(o, "zeros"), np.maximum(_weight(o, "count"), 1)
        moving = _moves(o)
        lost = (self._kept >= 3) & (zeros < 0.99 * self._zeros)
        for i in np.flatnonzero(lost):
            yield from self._tell(
                Alarm(
                    kind="mask-drift",
                    severity="warning",
                    step=o.step,
                    name=o.names[i],
                    what="zeros of a sparse value fill up",
                    found=f"{zeros[i]} exact zeros of {count[i]}",
                    wanted=f"{self._zeros[i]}, as before",
                    mend="ln.attach(model, optimizer)",
                )
            )
        same = moving & (zeros >= 0.2 * count) & (zeros < count) & (zeros == self._zeros)
        self._kept = np.where(same, self._kept + 1, 0)
        self._zeros = zeros

    def _tell(self, alarm: Alarm, once: bool = True) -> Iterator[Alarm]:
        key = (alarm.kind, alarm.name)
        if self._counts.get(alarm.kind, 0) < _MOST and not (once and key in self._told):
            self._told.add(key)
            self._counts[alarm.kind] = self._counts.get(alarm.kind, 0) + 1
            yield alarm


def _nonfinite(seen: Sighting, names: Sequence[str]) -> Alarm:
    bad = [names[i] for i in seen.indices]
    # Backward walks the model from its end: what it reached first is where it began.
    first = bad[-1] if seen.quantity == "gradient" else bad[0]
    others = "" if len(bad) == 1 else f", and {len(bad) - 1} more of {len(names)} parameters"
    since = f"; all weights were finite after step {seen.sound}" if seen.sound else ""
    what, wanted, mend = {
        "weight": (
            "the weight is not finite before the step",
            "finite values, which nobody but the optimizer writes",
            "print(ln.audit(model, optimizer, step))",
        ),
        "gradient": (
            "the gradient is not finite",
            "finite values",
            "torch.autograd.set_detect_anomaly(True)",
        ),
        "update": (
            "the weight is not finite after the step, though its gradient was",
            "finite values; a larger eps, a smaller lr",
            "for group in optimizer.param_groups: group['lr'] *= 0.1",
        ),
    }[seen.quantity]
    if seen.quantity == "weight" and 0 < seen.sound < seen.step - 1:
        what = "the weight has become non-finite in a step that there was no time to check"
        wanted = "finite values; without a budget every step is checked"
        mend = "ln.watch(model, optimizer, budget=None)"
    return Alarm(
        kind="non-finite",
        severity="error",
        step=seen.step,
        name=first,
        what=what,
        found=f"NaN or inf in the {seen.quantity} of {first}{others}{since}",
        wanted=wanted,
        mend=mend,
        rank=seen.rank,
    )
