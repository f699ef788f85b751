"""Learnables in models that exist: what trains, what does not."""

from learnables.grafting.freezing import freeze as freeze
from learnables.grafting.freezing import train_only as train_only
from learnables.grafting.freezing import unfreeze as unfreeze

__all__ = ["freeze", "train_only", "unfreeze"]
