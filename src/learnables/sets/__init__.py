"""Sets that a parameter can be kept in: ``ln.sets.Ball(radius=2.0)``. One file a set."""

from learnables.sets.apply import project_
from learnables.sets.ball import Ball
from learnables.sets.base import Set
from learnables.sets.box import Box
from learnables.sets.constraint import Constraint
from learnables.sets.correlation import Correlation
from learnables.sets.doubly_stochastic import DoublyStochastic
from learnables.sets.l1_ball import L1Ball
from learnables.sets.linf_ball import LinfBall
from learnables.sets.low_rank import LowRank
from learnables.sets.min_max_norm import MinMaxNorm
from learnables.sets.monotone import Monotone
from learnables.sets.nonnegative import NonNegative
from learnables.sets.orthogonal import Orthogonal
from learnables.sets.parametrized import bake
from learnables.sets.positive import Positive
from learnables.sets.psd import PSD
from learnables.sets.simplex import Simplex
from learnables.sets.skew import Skew
from learnables.sets.slices import Slices
from learnables.sets.special_orthogonal import SpecialOrthogonal
from learnables.sets.spectral_ball import SpectralBall
from learnables.sets.spectral_band import SpectralBand
from learnables.sets.sphere import Sphere
from learnables.sets.stiefel import Stiefel
from learnables.sets.sum_to import SumTo
from learnables.sets.symmetric import Symmetric
from learnables.sets.zero_mean import ZeroMean

__all__ = [
    "PSD",
    "Ball",
    "Box",
    "Constraint",
    "Correlation",
    "DoublyStochastic",
    "L1Ball",
    "LinfBall",
    "LowRank",
    "MinMaxNorm",
    "Monotone",
    "NonNegative",
    "Orthogonal",
    "Positive",
    "Set",
    "Simplex",
    "Skew",
    "Slices",
    "SpecialOrthogonal",
    "SpectralBall",
    "SpectralBand",
    "Sphere",
    "Stiefel",
    "SumTo",
    "Symmetric",
    "ZeroMean",
    "bake",
    "project_",
]
