"""Sets that a parameter can be kept in: ``ln.sets.Ball(radius=2.0)``. One file a set."""

from learnables.sets.ball import Ball
from learnables.sets.base import Set
from learnables.sets.box import Box
from learnables.sets.l1_ball import L1Ball
from learnables.sets.linf_ball import LinfBall
from learnables.sets.min_max_norm import MinMaxNorm
from learnables.sets.monotone import Monotone
from learnables.sets.nonnegative import NonNegative
from learnables.sets.positive import Positive
from learnables.sets.simplex import Simplex
from learnables.sets.sphere import Sphere
from learnables.sets.sum_to import SumTo
from learnables.sets.zero_mean import ZeroMean

__all__ = [
    "Ball",
    "Box",
    "L1Ball",
    "LinfBall",
    "MinMaxNorm",
    "Monotone",
    "NonNegative",
    "Positive",
    "Set",
    "Simplex",
    "Sphere",
    "SumTo",
    "ZeroMean",
]
