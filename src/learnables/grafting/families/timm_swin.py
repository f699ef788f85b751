"""timm's Swin and Swin V2: attention in windows of fixed size, stages of different widths."""

from torch import nn

from learnables.grafting.anatomy import Anatomy

_MODULES = ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr")


def look(model: nn.Module) -> Anatomy | None:
    """The blocks of all stages, which take no tokens; None for any other model."""
    library, _, name = type(model).__module__.partition(".models.")
    if library != "timm" or name not in _MODULES or not hasattr(model, "num_features"):
        return None
    blocks = "stages.*.blocks" if hasattr(model, "stages") else "layers.*.blocks"
    why = "attention in windows of fixed size has no room for further tokens"
    return Anatomy(blocks, int(model.num_features), refuses=why)  # type: ignore[arg-type]
