"""Swin and Swin V2 of transformers: attention in windows, stages of different widths."""

from torch import nn

from learnables.grafting.anatomy import Anatomy
from learnables.grafting.stack import model_type


def look(model: nn.Module) -> Anatomy | None:
    """The blocks of all stages, which take no tokens; None for any other model."""
    if model_type(model) not in ("swin", "swinv2"):
        return None
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "layers" and isinstance(module, nn.ModuleList):
            why = "attention in windows of fixed size has no room for further tokens"
            width = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
            return Anatomy(f"{name}.*.blocks", width, refuses=why)
    return None
