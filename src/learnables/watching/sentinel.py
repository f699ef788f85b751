"""Between looks: the norm of the gradient at every step, and who is not finite first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnables.watching.gradient import Consumption, norms, squares_and_faults

_NEVER = float("inf")
_ARRANGEMENTS = 64  # lists of indices that are kept on the device
_NAMED = 64  # skipped steps between two looks of which it is kept whose gradients were at fault


@dataclass(frozen=True)
class Sighting:
    """Where a non-finite value was seen first.

    Attributes:
        quantity: ``"weight"``, ``"gradient"`` or ``"update"``.
        step: The optimizer step.
        indices: Entries that hold one, in the order of the walk.
        rank: The rank that holds it; None where all ranks hold the same.
        sound: The last step before it after which all weights were seen to be finite; 0 for none.
    """

    quantity: str
    step: int
    indices: tuple[int, ...]
    rank: int | None = None
    sound: int = 0


@dataclass(frozen=True)
class Taken:
    """What a sentinel has kept since it was last asked, on the device still.

    Attributes:
        steps: The steps whose gradient was looked at.
        squares: Its sum of squares at each of them; shape ``(len(steps),)``.
        first: For weight, gradient and update the first step at which each entry was bad, inf for
            never; shape ``(3 · total,)``.
        overflows: Number of skipped steps, followed by a row for each of the first 64: the step,
            and for each entry 1 where its gradient was not finite. Empty where no scaler acted.
    """

    steps: list[int]
    squares: Tensor
    first: Tensor
    overflows: Tensor


@final
class Sentinel:
    """Keep norms, and the first step at which each parameter was not finite, without waiting.

    Three quantities are told apart. A weight that is not finite before the step, though it was
    after the last, was written to from outside. A gradient that is not finite, while the weights
    are, is the gradient's. A weight that is not finite after the step, when both were, got so in
    the update.

    A step that a scaler skips is no fault, but it is kept whose gradients made it skip.

    On the CPU the answer comes at once; elsewhere numbers stay on the device until `take`: whether
    a fused optimizer will skip is not known to the host, and is not asked.

    Args:
        total: Number of entries.
        device: Where the parameters are.
        shared: Each rank sees a part only: keep everything until `take`.
    """

    def __init__(self, total: int, device: torch.device, shared: bool) -> None:
        self.total, self.device = total, device
        self.immediate = device.type == "cpu" and not shared
        self._steps: list[int] = []
        self._squares: list[Tensor] = []
        self._sound = 0
        self._first = torch.full((3, total), _NEVER, dtype=torch.float64, device=device)
        self._at: dict[tuple[int, ...], Tensor] = {}
        # Row 0 counts; those after it hold a step and whose gradients were at fault.
        self._overflows: Tensor | None = None
        self._early: dict[tuple[int, ...], tuple[int, Tensor]] = {}  # by optimizer, of a step

    def before(
        self,
        step: int,
        indices: Sequence[int],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        how: Consumption,
    ) -> Sighting | None:
        """Look at the weights, and at the gradients that are about to be consumed."""
        at = [i for i, g in zip(indices, gradients, strict=True) if g is not None]
        there = [g for g in gradients if g is not None]
        skipped, early = self._will_skip(how), self._seen_early(step, indices)
        scale = None if how.scale is None else how.scale.to(self.device)
        if self.immediate:
            (square, faults), (_, bad) = squares_and_faults(there, weights)
            self._keep(step, square if scale is None else square / scale.double().square())
            if bad:
                return self._seen("weight", step, indices, bad)
            if skipped is not None and bool(skipped):
                blamed = _faults(gradients) if early is None else early
                self._keep_overflow(step, at, blamed, None)
            elif faults:
                return self._seen("gradient", step, at, faults)
            return None
        found = norms(there).to(self.device)
        found = found if scale is None else found / scale
        self._keep(step, found.double().square().sum())
        self._mark(0, step, list(indices), norms(weights).to(self.device), None)
        self._mark(1, step, at, found, skipped)
        if skipped is not None:
            self._keep_overflow(step, at, ~found.isfinite() if early is None else early, skipped)
        return None

    def unscaled(
        self, step: int, indices: Sequence[int], gradients: Sequence[Tensor | None]
    ) -> None:
        """Look at gradients that may be changed before ``step`` consumes them.

        Clipping by a norm that is NaN makes all of them NaN, so that it would not be seen any more
        whose it was.
        """
        self._early[tuple(indices)] = step, _faults(gradients).to(self.device)

    def _seen_early(self, step: int, indices: Sequence[int]) -> Tensor | None:
        of, bad = self._early.pop(tuple(indices), (step, None))
        return bad if of == step else None

    def overflow(
        self,
        step: int,
        indices: Sequence[int],
        gradients: Sequence[Tensor | None],
        how: Consumption | None = None,
    ) -> None:
        """Keep whose gradients are not finite at a step that the scaler skips.

        Args:
            step: The optimizer step.
            indices: Entries of one optimizer.
            gradients: Theirs, still as they were when it was decided.
            how: Where a fused optimizer decides by itself, on the device; None where the host knows
                that the step is skipped.
        """
        skipped = None if how is None else self._will_skip(how)
        bad = self._seen_early(step, indices)
        if self.immediate and skipped is not None and not bool(skipped):
            return
        at = [i for i, g in zip(indices, gradients, strict=True) if g is not None]
        self._keep_overflow(step, at, _faults(gradients) if bad is None else bad, skipped)

    def after(
        self, step: int, indices: Sequence[int], weights: Sequence[Tensor]
    ) -> Sighting | None:
        """Look at the weights after the step."""
        if self.immediate:
            ((_, bad),) = squares_and_faults(weights)
            if bad:
                return self._seen("update", step, indices, bad)
            self._sound = step
            return None
        self._mark(2, step, list(indices), norms(weights).to(self.device), None)
        return None

    def take(self) -> Taken:
        """What was kept since the last call."""
        none = torch.zeros(0, dtype=torch.float64, device=self.device)
        taken = Taken(
            self._steps,
            torch.stack(self._squares) if self._squares else none,
            self._first.reshape(-1).clone(),
            none if self._overflows is None else self._overflows.reshape(-1),
        )
        self._steps, self._squares, self._overflows = [], [], None
        self._first.fill_(_NEVER)
        return taken

    @property
    def holds_overflows(self) -> bool:
        """Whether a scaler has acted since the last `take`, as far as the host can know."""
        return self._overflows is not None

    def _will_skip(self, how: Consumption) -> Tensor | None:
        return None if how.overflow is None else how.overflow.to(self.device).reshape(()) != 0

    def _keep_overflow(
        self, step: int, at: Sequence[int], bad: Tensor, skipped: Tensor | None
    ) -> None:
        """One more row where ``skipped``, which only the device may know; None: it is so."""
        if self._overflows is None:
            shape = 1 + _NAMED, 1 + self.total
            self._overflows = torch.zeros(shape, dtype=torch.float64, device=self.device)
        if skipped is None:
            skipped = torch.ones((), dtype=torch.bool, device=self.device)
        count = self._overflows[0, 0]
        row = torch.zeros(1 + self.total, dtype=torch.float64, device=self.device)
        row[:1] = step
        row[self._where(at) + 1] = bad.to(row)
        place = (count + 1).clamp(max=_NAMED).long().reshape(1)
        old = self._overflows.index_select(0, place)
        new = torch.where(skipped & (count < _NAMED), row, old)
        self._overflows.index_copy_(0, place, new)
        self._overflows[0, 0] += skipped

    def _where(self, at: Sequence[int]) -> Tensor:
        # Made once: to copy it to the device each time would have the host wait for it.
        key = tuple(at)
        if key not in self._at:
            if len(self._at) > _ARRANGEMENTS:  # other parameters get a gradient at each step
                self._at.clear()
            self._at[key] = torch.tensor(key, dtype=torch.int64, device=self.device)
        return self._at[key]

    def _keep(self, step: int, square: Tensor) -> None:
        if self._steps and self._steps[-1] == step:  # another optimizer of the same step
            self._squares[-1] = self._squares[-1] + square
        else:
            self._steps.append(step)
            self._squares.append(square)

    def _mark(
        self, row: int, step: int, at: list[int], found: Tensor, unless: Tensor | None
    ) -> None:
        bad = ~found.isfinite()
        if unless is not None:
            bad &= ~unless
        where = self._where(at)
        first = self._first[row, where]
        self._first[row, where] = torch.where(bad & first.isinf(), float(step), first)

    def _seen(self, quantity: str, step: int, at: Sequence[int], bad: Sequence[int]) -> Sighting:
        return Sighting(quantity, step, tuple(at[i] for i in bad), sound=self._sound)


def _faults(gradients: Sequence[Tensor | None]) -> Tensor:
    """Which of those that are there are not finite; on their device."""
    return ~norms([g for g in gradients if g is not None]).isfinite()


def overflows(kept: Sequence[float], total: int) -> tuple[int, dict[int, tuple[int, ...]]]:
    """What `Sentinel.take` tells of skipped steps, once on the host.

    Args:
        kept: `Taken.overflows`; over ranks, the largest of each number.
        total: Number of entries.

    Returns:
        How many steps were skipped, and step → entries whose gradients were at fault.
    """
    if not kept:
        return 0, {}
    found: dict[int, set[int]] = {}
    most = min(int(kept[0]), _NAMED)
    for at in range(1, most + 1):
        step, *bad = kept[at * (1 + total) : (at + 1) * (1 + total)]
        found.setdefault(int(step), set()).update(i for i, one in enumerate(bad) if one)
    beyond = int(kept[0]) - most
    return len(found) + beyond, {step: tuple(sorted(bad)) for step, bad in found.items()}


def sightings(first: Sequence[Sequence[float]], world: int, base: int) -> list[Sighting]:
    """What `Sentinel.take` tells, once on the host: the earliest bad step and its cause.

    Args:
        first: For weight, gradient and update, the first bad step of each entry; inf for never.
            Where ``world`` > 1, it is ``(step − base) · world + rank``.
        world: Number of ranks that each saw a part; 1 where this one saw everything.
        base: Subtracted from the step where ``world`` > 1.
    """

    def step_of(code: float) -> int:
        return int(code) if world == 1 else int(code) // world + base

    found = []
    for quantity, codes in zip(("weight", "gradient", "update"), first, strict=True):
        earliest = min(codes, default=_NEVER)
        if earliest != _NEVER:
            step = step_of(earliest)
            at = tuple(i for i, c in enumerate(codes) if c != _NEVER and step_of(c) == step)
            rank = int(earliest) % world if world > 1 else None
            found.append(Sighting(quantity, step, at, rank))
    # Of one step: a weight that was bad before explains its gradient, and both the update.
    return sorted(found, key=lambda s: s.step)[:1]
