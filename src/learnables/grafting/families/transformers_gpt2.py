"""GPT-2 of transformers."""

from torch import nn

from learnables.grafting.anatomy import Anatomy
from learnables.grafting.stack import decoder, model_type


def look(model: nn.Module) -> Anatomy | None:
    """The module that takes ids: its table of positions counts the new tokens from 0."""
    return decoder(model) if model_type(model) == "gpt2" else None
