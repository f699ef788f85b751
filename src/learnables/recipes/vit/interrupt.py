"""Ctrl-C as a wish: finish the step, save, then stop."""

import signal
import threading
from types import FrameType
from typing import final


@final
class Interrupt:
    """For the length of a ``with``, the first Ctrl-C or SIGTERM only raises a flag.

    A second Ctrl-C ends the process at once, as usual, unless several processes train together:
    torchrun passes a Ctrl-C on to processes that the terminal has told already.

    Args:
        patient: Whether further signals are ignored too.
    """

    def __init__(self, patient: bool = False) -> None:
        self.requested = False
        self._patient = patient
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interrupt":
        """Take the signals over; in any thread but the main one, that is not possible."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and not self._patient and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
