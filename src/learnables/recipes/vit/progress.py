"""What the terminal shows while a model trains."""

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Display(Protocol):
    """A place to show how training goes; a context manager."""

    def __enter__(self) -> "Display":
        """Begin to show."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, and leave the terminal as it was."""

    def step(self, step: int, loss: float) -> None:
        """Training has done ``step`` steps; ``loss`` is a recent one."""

    def epoch(self, epoch: int, accuracy: float) -> None:
        """An epoch has ended with this accuracy on the test images, from 0 to 1."""

    def say(self, text: str) -> None:
        """Print a line."""


class Silent:
    """Shows nothing: every process but the first."""

    def __enter__(self) -> "Silent":
        """Nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing."""

    def step(self, step: int, loss: float) -> None:
        """Nothing."""

    def epoch(self, epoch: int, accuracy: float) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


class Bar:
    """A bar with time to go, loss and accuracy; in a file or a pipe, a line now and then.

    Args:
        steps: Steps in all.
        done: Steps done before.
        epochs: Epochs in all.
        console: Where to; the standard output when None.
    """

    def __init__(self, steps: int, done: int, epochs: int, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        self._epochs, self._loss, self._accuracy = epochs, float("nan"), float("nan")
        self._live = self.console.is_terminal
        self._spoken = 0.0
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  test {task.fields[accuracy]:.2%}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self._live,
            transient=False,
        )
        self._task = self._progress.add_task(
            f"epoch 0/{epochs}", total=steps, completed=done, loss=self._loss, accuracy=0.0
        )

    def __enter__(self) -> "Bar":
        """Begin to show."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and give the cursor back."""
        self._progress.stop()

    def step(self, step: int, loss: float) -> None:
        """Move the bar."""
        self._loss = loss
        self._progress.update(self._task, completed=step, loss=loss)

    def epoch(self, epoch: int, accuracy: float) -> None:
        """Show the accuracy; without a terminal, at most every five seconds and at the end."""
        self._accuracy = accuracy
        self._progress.update(
            self._task, description=f"epoch {epoch}/{self._epochs}", accuracy=accuracy
        )
        if not self._live and (epoch == self._epochs or time.monotonic() - self._spoken > 5):
            self._spoken = time.monotonic()
            self.say(f"epoch {epoch}/{self._epochs}  loss {self._loss:.3f}  test {accuracy:.2%}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, markup=False)
