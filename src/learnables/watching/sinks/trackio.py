"""Trackio: norms, update ratios and scalars in its local dashboard."""

from collections.abc import Mapping
from typing import Any, final

from learnables.arguments import require_text
from learnables.errors import need_extra
from learnables.watching.alarm import Alarm
from learnables.watching.observation import Observation
from learnables.watching.sinks.base import Sink
from learnables.watching.sinks.flat import numbers


@final
class Trackio(Sink):
    """Log to a Trackio project. Its histograms are of one step only, so norms and ratios go there.

    Args:
        project: The project's name.
        options: Handed to ``trackio.init``: ``name``, ``space_id``, …

    Raises:
        ArgumentError: ``project`` is no text.
        MissingExtraError: The package trackio is not installed.
    """

    def __init__(self, project: str, **options: Any) -> None:
        require_text(project, "project")
        try:
            import trackio
        except ImportError as error:
            raise need_extra("trackio", "trackio", "logging to Trackio") from error
        self._trackio = trackio
        trackio.init(project=project, **options)

    def observation(self, observation: Observation) -> None:
        """Norms and ratios."""
        self._trackio.log(numbers(observation), step=observation.step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers under their names."""
        self._trackio.log(dict(values), step=step)

    def alarm(self, alarm: Alarm) -> None:
        """How many of its kind there are is a number; the words stay in the run database."""
        self._trackio.log({f"alarm/{alarm.kind}": 1.0}, step=alarm.step)

    def close(self) -> None:
        """Finish the run."""
        self._trackio.finish()
