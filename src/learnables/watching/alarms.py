"""What deserves an alarm, judged from the observations alone."""

from collections.abc import Iterator
from typing import final

from learnables.watching.alarm import Alarm
from learnables.watching.observation import QUANTITIES, Observation


@final
class Judge:
    """Call it with each observation in turn; it yields what is new and wrong."""

    def __init__(self) -> None:
        self._known: set[tuple[str, str]] = set()

    def __call__(self, observation: Observation) -> Iterator[Alarm]:
        """The alarms that this observation adds."""
        for alarm in _nonfinite(observation):
            if (alarm.kind, alarm.name) not in self._known:
                self._known.add((alarm.kind, alarm.name))
                yield alarm


def _nonfinite(o: Observation) -> Iterator[Alarm]:
    if o.skipped:
        return  # the scaler saw it and skipped the step: that is its work
    for quantity in QUANTITIES:
        rows = o.rows.get(quantity)
        if rows is None:
            continue
        for i in rows.moments["nonfinite"].nonzero()[0]:
            yield Alarm(
                kind="non-finite",
                severity="error",
                step=o.step,
                name=o.names[i],
                what=f"the {quantity} is not finite",
                found=f"{rows.moments['nonfinite'][i]} of {rows.moments['count'][i]} values "
                "are NaN or inf",
                wanted="finite values",
                mend="torch.autograd.set_detect_anomaly(True)",
            )
