"""Components: the parameters that people write by hand, ready made. One family a file."""

from learnables.nn.color import ColorMatrix
from learnables.nn.component import Component
from learnables.nn.positions import Positions2d
from learnables.nn.scales import LayerScale
from learnables.nn.tokens import ClassToken, RegisterTokens

__all__ = [
    "ClassToken",
    "ColorMatrix",
    "Component",
    "LayerScale",
    "Positions2d",
    "RegisterTokens",
]
