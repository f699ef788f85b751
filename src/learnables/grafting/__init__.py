"""Learnables in models that exist: put in and taken out; what trains, what does not."""

from learnables.grafting.freezing import freeze as freeze
from learnables.grafting.freezing import train_only as train_only
from learnables.grafting.freezing import unfreeze as unfreeze
from learnables.grafting.graft import Graft as Graft
from learnables.grafting.graft import graft as graft
from learnables.grafting.graft import grafts_of as grafts_of

__all__ = ["Graft", "freeze", "graft", "grafts_of", "train_only", "unfreeze"]
