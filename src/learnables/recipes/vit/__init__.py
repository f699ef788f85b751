"""A Vision Transformer from scratch on a small image set.

config · data · augment · crew · interrupt · progress · measure · train, in the order they act.
"""

from learnables.recipes.vit.config import PRESETS, Config, choose

__all__ = ["PRESETS", "Config", "choose"]
