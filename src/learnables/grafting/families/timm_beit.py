"""timm's BEiT: its attention has a table of relative positions that counts the tokens."""

from torch import nn

from learnables.grafting.anatomy import Anatomy


def look(model: nn.Module) -> Anatomy | None:
    """The blocks, which take no further tokens; None for any other model."""
    if type(model).__module__ == "timm.models.beit" and hasattr(model, "blocks"):
        why = "its table of relative positions has one number for each pair of tokens"
        return Anatomy("blocks", int(model.embed_dim), 1, refuses=why)  # type: ignore[arg-type]
    return None
