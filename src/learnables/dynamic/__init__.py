"""Weights made from an input, and products with them that never build them."""

from learnables.dynamic.cost import FORMS, estimate, quickest
from learnables.dynamic.mix import mix

__all__ = ["FORMS", "estimate", "mix", "quickest"]
