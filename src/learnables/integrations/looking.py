"""What the callbacks of all trainers do alike: audit the first iterations, watch the rest."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from learnables._torch import rank_and_world
from learnables.auditing.report import Report
from learnables.auditing.run import Observation, observe
from learnables.watching.recorder import Watcher, watch
from learnables.watching.sinks.base import Sink


class Looking:
    """An audit of the first iterations of somebody's loop, and a watch over all of it.

    Args:
        audit: Iterations to audit; 0 for no audit.
        fail: Raise `AuditFailed` where the audit finds an error, instead of only printing.
        watch: Steps between two looks of `ln.watch`; 0 for no watch.
        to: Folder of the run database.
        sinks: As in `ln.watch`.
        budget: Likewise.

    Attributes:
        report: What the audit found, once it is there.
        watcher: The watch, while training runs and afterwards.
    """

    def __init__(
        self,
        *,
        audit: int = 4,
        fail: bool = False,
        watch: int = 100,
        to: "str | Path | None" = "runs/run",
        sinks: Sequence[Sink] = (),
        budget: float | None = 0.01,
    ) -> None:
        self.report: Report | None = None
        self.watcher: Watcher | None = None
        self._audit, self._fail, self._watch = audit, fail, watch
        self._to, self._sinks, self._budget = to, sinks, budget
        self._observation: Observation | None = None

    def begin_looking(
        self, model: nn.Module, optimizers: Iterable[Optimizer], scaler: Any = None, step: int = 0
    ) -> None:
        """Training begins: with ``model``, as it is called, and every optimizer there is."""
        optimizers = list(optimizers)
        self.end_looking()  # a fit that was broken off
        if self._watch:
            self.watcher = watch(
                model,
                optimizers,
                self._watch,
                self._to,
                self._sinks,
                budget=self._budget,
                scaler=scaler,
                step=step,
            )
        if self._audit:
            self._observation = observe(
                model, optimizers=optimizers, scaler=scaler, steps=self._audit
            )
            self._observation.__enter__()

    def look_after_iteration(self) -> None:
        """An iteration is over: print the report if it has just come.

        Raises:
            AuditFailed: It has errors, and ``fail`` was asked for.
        """
        if self._observation is not None and self._observation.report is not None:
            self._tell(self._observation.report)

    def look_at_numbers(self, step: int, values: dict[str, Any]) -> None:
        """Numbers that the trainer logs go into the run database too."""
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}
        if self.watcher is not None and numbers:
            self.watcher.log_scalars(step, numbers)

    def keep_what_was_seen(self) -> None:
        """A checkpoint is saved: the record must not lack what came before it."""
        if self.watcher is not None:
            self.watcher.flush()

    def end_looking(self, broken: BaseException | None = None) -> None:
        """Training is over, or ``broken`` ended it; the report of a short one comes now."""
        observation, self._observation = self._observation, None
        try:
            if observation is not None:
                observation.__exit__(type(broken) if broken is not None else None, broken, None)
                if observation.report is not None and broken is None:
                    self._tell(observation.report)
        finally:
            if self.watcher is not None:
                self.watcher.close()

    def _tell(self, report: Report) -> None:
        self.report, self._observation = report, None
        if self.watcher is not None:
            self.watcher.log_document("audit", report.to_dict())
        if rank_and_world()[0] == 0 and not report.ok:
            print(f"\nlearnables: {report}", file=sys.stderr, flush=True)
        if self._fail:
            report.raise_for_errors()
