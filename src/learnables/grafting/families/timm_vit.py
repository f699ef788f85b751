"""timm's plain Vision Transformers: ViT, DeiT, EVA, DINOv2, DINOv3, SigLIP."""

from torch import nn

from learnables.grafting.anatomy import Anatomy

_MODULES = ("vision_transformer", "deit", "eva")


def look(model: nn.Module) -> Anatomy | None:
    """The blocks of timm's models of this family; None for any other model."""
    library, _, name = type(model).__module__.partition(".models.")
    if library == "timm" and name in _MODULES and hasattr(model, "blocks"):
        prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
        return Anatomy("blocks", int(model.embed_dim), prefix, "blocks.*.attn")  # type: ignore[arg-type]
    return None
