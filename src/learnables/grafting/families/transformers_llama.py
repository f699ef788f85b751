"""Decoders of transformers with rotary positions: Llama and those that are built like it."""

from torch import nn

from learnables.grafting.anatomy import Anatomy
from learnables.grafting.stack import decoder, model_type

_KINDS = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "gemma",
    "phi3",
    "smollm3",
    "olmo",
    "olmo2",
    "gpt_neox",
)


def look(model: nn.Module) -> Anatomy | None:
    """The module that takes ids; rotations, the causal mask and the cache count the new tokens."""
    return decoder(model) if model_type(model) in _KINDS else None
