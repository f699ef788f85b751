"""Initialisers as small objects: ``ln.init.trunc_normal(0.02)``. One family a file."""

from learnables.init.base import Initializer
from learnables.init.random import trunc_normal

__all__ = ["Initializer", "trunc_normal"]
