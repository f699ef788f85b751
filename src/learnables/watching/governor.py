"""When to look: keeps what watching costs under a share of what training costs."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import final

_LEAST = 5  # looks in a row are what the most patient alarm needs: no run does with fewer
_CHECKING = 1 / 3  # of the budget, at most, goes into checks: what is left are looks
_KNOWN = 3  # checks, before what one takes is known


@final
class Governor:
    """Decide at which steps there is time to look.

    A look happens at the first step, then at multiples of ``every``, but only where all that was
    spent on watching so far, with the look to come, stays within ``budget`` of the time that
    training took. So the interval grows by itself where steps are short or looks are dear, and the
    bound holds for the run as a whole, not on average over some window. The first five looks come
    as asked whatever they cost; what they take is saved later.

    Args:
        every: The interval that was asked for, in steps; ≥ 1.
        budget: Watching time ÷ training time that is allowed; None for no bound.

    Attributes:
        spent: Seconds spent on watching so far.
        elapsed: Seconds that training took so far, watching not counted.

    Example:
        >>> governor = Governor(every=10, budget=0.01)
        >>> for _ in range(5):
        ...     governor.looked(0.1)                # seconds
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
        self._checking = 0.0  # of what was spent, the checks between looks
        self._steps: deque[float] = deque(maxlen=31)
        self._looks: deque[float] = deque(maxlen=5)
        self._checks: deque[float] = deque(maxlen=31)
        self._look = self._check = 0.0  # their medians: they are asked for at every step
        self._agreed: tuple[int, list[float]] | None = None
        self._since = 0  # checks after that

    def stepped(self, seconds: float) -> None:
        """Training took ``seconds`` since the last step."""
        self.elapsed += seconds
        self._steps.append(seconds)

    def looked(self, seconds: float) -> None:
        """A look took ``seconds``."""
        self.spent += seconds
        self._looks.append(seconds)
        self._look = median(self._looks)

    def checked(self, seconds: float) -> None:
        """A check between looks took ``seconds``."""
        self.spent += seconds
        self._checking += seconds
        self._checks.append(seconds)
        self._check = median(self._checks)

    def wrote(self, seconds: float) -> None:
        """Writing down numbers that were given took ``seconds``."""
        self.spent += seconds

    def due(self, step: int) -> bool:
        """Whether to look at this step."""
        if step % self.every and self._looks:
            return False
        if self.budget is None or len(self._looks) < _LEAST:
            return True
        spent, elapsed, look, *_ = self._at(step)
        return spent + look <= self.budget * elapsed

    def watches(self, step: int) -> bool:
        """Whether there is time for a check at this step: those get a third of the budget.

        The first three are made in any case: before, what one takes is not known.
        """
        if self.budget is None or len(self._checks) < _KNOWN:
            return True
        spent, elapsed, _, check, checking = self._at(step)
        allowed = self.budget * elapsed
        due = spent + check <= allowed and checking + check <= _CHECKING * allowed
        self._since += due
        return due

    def clocks(self) -> list[float]:
        """In seconds: spent, elapsed; medians of a step, a look and a check; spent on checks."""
        step = median(self._steps or [0.0])
        return [self.spent, self.elapsed, step, self._look, self._check, self._checking]

    def agree(self, step: int, clocks: Sequence[float] = (0.0,) * 6) -> None:
        """From now on decide by these clocks, as every rank does, and no more by one's own.

        Without ``clocks`` by none: every look and every check is made until some are agreed on.
        """
        self._agreed, self._since = (step, list(clocks)), 0

    def _at(self, step: int) -> tuple[float, float, float, float, float]:
        """At this step: spent, elapsed, what a look takes and what a check, spent on checks."""
        if self._agreed is None:
            return self.spent, self.elapsed, self._look, self._check, self._checking
        since, (spent, elapsed, seconds, look, check, checking) = self._agreed
        made = self._since * check
        trained = elapsed + (step - since) * seconds
        return spent + made, trained, look, check, checking + made

    @property
    def overhead(self) -> float:
        """Watching time ÷ training time so far; nan before any step was timed."""
        return self.spent / self.elapsed if self.elapsed else math.nan
