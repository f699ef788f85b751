"""Weights & Biases: norms, update ratios, scalars and histograms as they were counted."""

from collections.abc import Mapping
from typing import Any, final

import numpy as np

from learnables.arguments import require_text
from learnables.errors import need_extra
from learnables.watching.alarm import Alarm
from learnables.watching.observation import Observation
from learnables.watching.sinks.base import Sink
from learnables.watching.sinks.escape import tensorboard_tag
from learnables.watching.sinks.flat import numbers
from learnables.watching.sinks.tensorboard import buckets

_MOST = 512  # bins that a wandb histogram may have


@final
class WeightsAndBiases(Sink):
    """Log to a wandb run: what ``wandb.watch`` shows, but of the gradient that was consumed.

    Args:
        project: The project's name.
        options: Handed to ``wandb.init``: ``name``, ``mode="offline"``, ``dir``, …

    Raises:
        ArgumentError: ``project`` is no text.
        MissingExtraError: The package wandb is not installed.
    """

    def __init__(self, project: str, **options: Any) -> None:
        require_text(project, "project")
        try:
            import wandb
        except ImportError as error:
            raise need_extra("wandb", "wandb", "logging to Weights & Biases") from error
        self._wandb = wandb
        self._run = wandb.init(project=project, **options)

    def observation(self, observation: Observation) -> None:
        """Norms, ratios and histograms."""
        logged: dict[str, Any] = dict(numbers(observation))
        for quantity, rows in observation.rows.items():
            if rows.filled is None:
                continue
            filled = rows.filled.by_row()
            for i in np.flatnonzero(rows.present).tolist():
                limits, counts = buckets(filled[i], rows, i)
                if 1 < len(limits) <= _MOST and counts[0] == 0:  # the first edge opens the first
                    tag = tensorboard_tag(observation.names[i])
                    pair = (np.array(counts[1:]), np.array(limits))
                    logged[f"{quantity}/{tag}"] = self._wandb.Histogram(np_histogram=pair)
        self._run.log(logged, step=observation.step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers under their names."""
        self._run.log(dict(values), step=step)

    def alarm(self, alarm: Alarm) -> None:
        """As wandb's own alert."""
        self._run.alert(title=f"{alarm.kind}: {alarm.name}", text=str(alarm), level="WARN")

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
