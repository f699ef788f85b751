"""Between looks: the norm of the gradient at every step, and who is not finite first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnables.watching.gradient import Consumption, norms, squares_and_faults

_NEVER = float("inf")


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


@final
class Sentinel:
    """Keep norms, and the first step at which each parameter was not finite, without waiting.

    Three quantities are told apart. A weight that is not finite before the step, though it was
    after the last, was written to from outside. A gradient that is not finite, while the weights
    are, is the gradient's. A weight that is not finite after the step, when both were, got so in
    the update.

    On the CPU the answer comes at once; elsewhere numbers stay on the device until `take`.

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
        self._skips = torch.zeros((), dtype=torch.float64, device=device)

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
        skipped = None if how.overflow is None else how.overflow.to(self.device) != 0
        if skipped is not None:
            self._skips += skipped.reshape(())
        scale = None if how.scale is None else how.scale.to(self.device)
        if self.immediate:
            (square, faults), (_, bad) = squares_and_faults(there, weights)
            self._keep(step, square if scale is None else square / scale.double().square())
            if bad:
                return self._seen("weight", step, indices, bad)
            if faults and not (skipped is not None and bool(skipped)):
                return self._seen("gradient", step, at, faults)
            return None
        found = norms(there).to(self.device)
        found = found if scale is None else found / scale
        self._keep(step, found.double().square().sum())
        self._mark(0, step, list(indices), norms(weights).to(self.device), None)
        self._mark(1, step, at, found, skipped)
        return None

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

    def take(self) -> tuple[list[int], Tensor, Tensor]:
        """What was kept since the last call, still on the device.

        Returns:
            The steps; for each of them the sum of squares of the gradients, followed by the
            number of steps that a fused optimizer skipped; and for weight, gradient and update
            the first step at which each entry was bad, inf for never, as shape (3 · total,).
        """
        steps, squares = self._steps, self._squares
        kept = torch.stack([*squares, self._skips])
        first = self._first.reshape(-1).clone()
        self._steps, self._squares = [], []
        self._skips = torch.zeros_like(self._skips)
        self._first.fill_(_NEVER)
        return steps, kept, first

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
        where = torch.tensor(at, device=self.device)
        first = self._first[row, where]
        self._first[row, where] = torch.where(bad & first.isinf(), float(step), first)

    def _seen(self, quantity: str, step: int, at: Sequence[int], bad: Sequence[int]) -> Sighting:
        return Sighting(quantity, step, tuple(at[i] for i in bad), sound=self._sound)


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
