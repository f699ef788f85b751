"""Initialisers as small objects: ``ln.init.trunc_normal(0.02)``. One family a file."""

from learnables.init.base import Initializer
from learnables.init.fixed import constant, identity, ones, zeros
from learnables.init.random import trunc_normal
from learnables.init.redraw import reset_

__all__ = ["Initializer", "constant", "identity", "ones", "reset_", "trunc_normal", "zeros"]
