"""Vision encoders of transformers: ViT, DeiT, BEiT, DINOv2, DINOv3, CLIP and SigLIP."""

from torch import nn

from learnables.grafting.anatomy import Anatomy

_KINDS = ("vit", "deit", "beit", "dinov2", "dinov3_vit", "clip_vision_model", "siglip_vision_model")


def look(model: nn.Module) -> Anatomy | None:
    """The longest list of layers in transformers' models of this family; None for another model."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in _KINDS:
        return None
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    depth = getattr(config, "num_hidden_layers", None)
    names = [n for n, m in stacks.items() if len(m) == depth and n.endswith(("layer", "layers"))]
    return Anatomy(names[0], int(config.hidden_size)) if names else None  # type: ignore[union-attr]
