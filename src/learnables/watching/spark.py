"""Numbers over steps as one row of characters."""

import math
from collections.abc import Sequence

import numpy as np

_BLOCKS = "▁▂▃▄▅▆▇█"


def spark(values: Sequence[float], width: int = 24, log: bool = False) -> str:
    """Numbers as a row of blocks; gaps where they are not finite.

    Example:
        >>> spark([0, 1, 2, 3], width=4)
        '▁▃▆█'
    """
    if not len(values):
        return ""
    groups = np.array_split(np.asarray(values, float), min(width, len(values)))
    points = np.array([g[np.isfinite(g)].max(initial=-math.inf) for g in groups])
    if log:
        points = np.where(points > 0, np.log(np.maximum(points, 1e-300)), -math.inf)
    known = points[np.isfinite(points)]
    if not len(known):
        return " " * len(points)
    low = known.min()
    span = max(known.max() - low, 1e-5 * np.abs(known).max(), 1e-12)  # rounding is no curve
    return "".join(
        _BLOCKS[round((p - low) / span * 7)] if math.isfinite(p) else " " for p in points
    )
