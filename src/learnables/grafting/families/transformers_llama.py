"""Decoders of transformers with rotary positions: Llama, Mistral, Qwen2, Qwen3, OLMo, GPT-NeoX."""

from torch import nn

from learnables.grafting.anatomy import Anatomy
from learnables.grafting.stack import decoder, model_type

_KINDS = ("llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2", "gpt_neox")


def look(model: nn.Module) -> Anatomy | None:
    """The module that takes ids; rotations, the causal mask and the cache count the new tokens."""
    return decoder(model) if model_type(model) in _KINDS else None
