"""Vision encoders of transformers: ViT, DeiT, BEiT, DINOv2, DINOv3, CLIP and SigLIP."""

from torch import nn

from learnables.grafting.anatomy import Anatomy
from learnables.grafting.stack import encoder, model_type

_CLASS_TOKENS = {
    "vit": 1,
    "deit": 2,
    "beit": 1,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
}


def look(model: nn.Module) -> Anatomy | None:
    """The first list of as many layers as the configuration says; None for another model."""
    if model_type(model) not in _CLASS_TOKENS:
        return None
    config = model.config
    registers = int(getattr(config, "num_register_tokens", 0))
    tables = ("use_relative_position_bias", "use_shared_relative_position_bias")
    counts = any(getattr(config, name, False) for name in tables)
    why = "its table of relative positions has one number for each pair of tokens"
    return encoder(model, _CLASS_TOKENS[model_type(model)] + registers, why if counts else "")
