"""What deserves an alarm, judged from the observations alone."""

from collections.abc import Iterator, Sequence
from typing import final

from learnables.watching.alarm import Alarm
from learnables.watching.observation import Observation
from learnables.watching.sentinel import Sighting

_MOST = 20  # alarms of one kind in one run: who has not looked by then does not look


@final
class Judge:
    """Call it with each observation in turn; it yields what is new and wrong."""

    def __init__(self) -> None:
        self._last_sighting = -(10**9)
        self._told: dict[str, int] = {}

    def __call__(self, observation: Observation) -> Iterator[Alarm]:
        """The alarms that this observation adds."""
        yield from ()

    def sighted(self, sighting: Sighting, names: Sequence[str]) -> Iterator[Alarm]:
        """The alarm for a non-finite value, unless it only goes on from the last one."""
        new = sighting.step > self._last_sighting + 100
        self._last_sighting = sighting.step
        if new and self._told.setdefault("non-finite", 0) < _MOST:
            self._told["non-finite"] += 1
            yield _nonfinite(sighting, names)


def _nonfinite(seen: Sighting, names: Sequence[str]) -> Alarm:
    bad = [names[i] for i in seen.indices]
    # Backward walks the model from its end: what it reached first is where it began.
    first = bad[-1] if seen.quantity == "gradient" else bad[0]
    others = "" if len(bad) == 1 else f", and {len(bad) - 1} more of {len(names)} parameters"
    what, wanted, mend = {
        "weight": (
            "the weight is not finite before the step, though it was after the last one",
            "finite values, which nobody but the optimizer writes",
            "",
        ),
        "gradient": (
            "the gradient is not finite",
            "finite values",
            "torch.autograd.set_detect_anomaly(True)",
        ),
        "update": (
            "the weight is not finite after the step, though its gradient was",
            "finite values; a larger eps, a smaller lr",
            "optimizer.param_groups",
        ),
    }[seen.quantity]
    return Alarm(
        kind="non-finite",
        severity="error",
        step=seen.step,
        name=first,
        what=what,
        found=f"NaN or inf in the {seen.quantity} of {first}{others}",
        wanted=wanted,
        mend=mend,
        rank=seen.rank,
    )
