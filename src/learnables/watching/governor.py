"""When to look: keeps what watching costs under a share of what training costs."""

import math
from collections import deque
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

    def due(self, step: int) -> bool:
        """Whether to look at this step."""
        if step % self.every and self._looks:
            return False
        if self.budget is None or not self._looks:
            return True
        return self.spent + median(self._looks) <= self.budget * self.elapsed

    @property
    def stride(self) -> int:
        """A check between looks fits into half of the budget at every so many steps."""
        if self.budget is None or len(self._steps) < 3 or not self._checks:
            return 1
        allowed = 0.5 * self.budget * median(self._steps)
        return max(1, math.ceil(median(self._checks) / max(allowed, 1e-12)))

    @property
    def overhead(self) -> float:
        """Watching time ÷ training time so far; nan before any step was timed."""
        return self.spent / self.elapsed if self.elapsed else math.nan
