"""An observation as one flat mapping of numbers, for loggers that know nothing else."""

import math

import numpy as np

from learnables.watching.observation import Observation
from learnables.watching.sinks.escape import tensorboard_tag


def numbers(observation: Observation) -> dict[str, float]:
    """Norms of weight, gradient and update, and the update ratio, by ``quantity_norm/name``.

    Non-finite numbers are left out: most loggers refuse them, and the alarm has named them.
    """
    found: dict[str, float] = {}
    tags = [tensorboard_tag(name) for name in observation.names]
    for quantity, rows in observation.rows.items():
        for i in np.flatnonzero(rows.present):
            found[f"{quantity}_norm/{tags[i]}"] = float(rows.norm[i])
    for i in np.flatnonzero(np.isfinite(observation.ratio)):
        found[f"update_ratio/{tags[i]}"] = float(observation.ratio[i])
    return {name: value for name, value in found.items() if math.isfinite(value)}
