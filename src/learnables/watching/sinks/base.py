"""What a sink is: a place where the numbers of a run go besides its database."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from learnables.watching.alarm import Alarm
from learnables.watching.observation import Observation


class Sink(ABC):
    """One place. It is handed plain data and may take its time: it counts as watching.

    What a sink raises ends the watching, never the training.
    """

    @abstractmethod
    def observation(self, observation: Observation) -> None:
        """Take an observation."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers by name."""

    def alarm(self, alarm: Alarm) -> None:  # noqa: B027 - most have no place for alarms
        """Take an alarm."""

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Write what is pending."""
