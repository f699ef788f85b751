"""When to look: keeps what watching costs under a share of what training costs."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import final


@final
class Governor:
    """Decide at which steps there is time to look.

    A look happens at the first step, then at multiples of ``every``, but only where all that was
    spent on watching so far, with the look to come, stays within ``budget`` of the time that
    training took. So the interval grows by itself where steps are short or looks are dear, and the
    bound holds for the run as a whole, not on average over some window.

    Args:
        every: The interval that was asked for, in steps; ≥ 1.
        budget: Watching time ÷ training time that is allowed; None for no bound.

    Attributes:
        spent: Seconds spent on watching so far.
        elapsed: Seconds that training took so far, watching not counted.

    Example:
        >>> governor = Governor(every=10, budget=0.01)
        >>> governor.looked(0.5)                    # seconds
        >>> for _ in range(2000):
        ...     governor.stepped(0.1)
        >>> governor.due(1000), governor.due(2000)  # 100 s would be needed; 200 s have passed
        (True, True)
        >>> governor.looked(5.0)
        >>> governor.due(2010)
        False
    """

    def __init__(self, every: int, budget: float | None) -> None:
        self.every, self.budget = every, budget
        self.spent = self.elapsed = 0.0
        self._steps: deque[float] = deque(maxlen=31)
        self._looks: deque[float] = deque(maxlen=5)
        self._checks: deque[float] = deque(maxlen=31)
        self._agreed: tuple[int, list[float]] | None = None

    def stepped(self, seconds: float) -> None:
        """Training took ``seconds`` since the last step."""
        self.elapsed += seconds
        self._steps.append(seconds)

    def looked(self, seconds: float) -> None:
        """A look took ``seconds``."""
        self.spent += seconds
        self._looks.append(seconds)

    def checked(self, seconds: float) -> None:
        """A check between looks took ``seconds``."""
        self.spent += seconds
        self._checks.append(seconds)

    def wrote(self, seconds: float) -> None:
        """Writing down numbers that were given took ``seconds``."""
        self.spent += seconds

    def due(self, step: int) -> bool:
        """Whether to look at this step."""
        if step % self.every and self._looks:
            return False
        if self.budget is None or not self._looks:
            return True
        spent, elapsed, _, look, _ = self._at(step)
        return spent + look <= self.budget * elapsed

    def watches(self, step: int) -> bool:
        """Whether there is time for a check at this step: those get half of the budget."""
        if self.budget is None:
            return True
        *_, seconds, _, check = self._at(step)
        allowed = 0.5 * self.budget * seconds
        return step % max(1, math.ceil(check / allowed) if allowed > 0 else 1) == 0

    def clocks(self) -> list[float]:
        """Spent, elapsed, and the medians of a step, a look and a check, in seconds."""
        return [
            self.spent,
            self.elapsed,
            *(median(times or [0.0]) for times in (self._steps, self._looks, self._checks)),
        ]

    def agree(self, step: int, clocks: Sequence[float]) -> None:
        """From now on decide by these clocks, as every rank does, and no more by one's own."""
        self._agreed = (step, list(clocks))

    def _at(self, step: int) -> list[float]:
        if self._agreed is None:
            return self.clocks()
        since, (spent, elapsed, seconds, look, check) = self._agreed
        return [spent, elapsed + (step - since) * seconds, seconds, look, check]

    @property
    def overhead(self) -> float:
        """Watching time ÷ training time so far; nan before any step was timed."""
        return self.spent / self.elapsed if self.elapsed else math.nan
