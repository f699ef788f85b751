"""Where models of transformers keep their layers, by what their configuration or forward says."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

from torch import nn

from learnables.grafting.anatomy import Anatomy

_LISTS = ("layer", "layers", "h")
_DECODES = {"input_ids", "inputs_embeds", "past_key_values"}


def model_type(model: nn.Module) -> str:
    """What ``model.config.model_type`` says, or an empty string."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def encoder(model: nn.Module, prefix: int, refuses: str = "") -> Anatomy | None:
    """The first list of as many layers as the configuration says; None where there is none."""
    config = model.config
    depth = getattr(config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in _LISTS
        if is_list and len(module) == depth:
            width = int(config.hidden_size)  # type: ignore[union-attr, arg-type]
            attention = _attention(module[0])
            attention = f"{name}.*.{attention}" if attention else ""
            return Anatomy(name, width, prefix, attention, refuses=refuses)
    return None


def decoder(model: nn.Module) -> Anatomy | None:
    """As `encoder`, with the module that takes ids and a cache, and its embedding."""
    found = encoder(model, 0)
    if found is None:
        return None
    # The module that owns the list of layers: inside of wrappers such as PEFT's, too.
    entrance = found.blocks.rpartition(".")[0]
    base: Any = model.get_submodule(entrance)
    paths = {id(module): name for name, module in model.named_modules()}
    embedding = paths[id(base.get_input_embeddings())]
    return Anatomy(found.blocks, found.width, entrance=entrance, embedding=embedding)


def decoder_around(model: nn.Module, paths: Sequence[str]) -> Anatomy | None:
    """What can be told of a decoder that no family knows, where ``paths`` are its layers.

    Tokens put in before its first layer would be counted by neither mask, positions nor cache. So
    they are put in front of its embedding, as in the decoders that are known. None where the module
    around the layers does not take ids, vectors in their place, and a cache.
    """
    stacks = {path.rpartition(".")[0] for path in paths}
    entrance, _, _ = min(stacks).rpartition(".")
    base: Any = model.get_submodule(entrance)
    takes = {*signature(type(base).forward).parameters}
    if len(stacks) > 1 or not takes >= _DECODES or not hasattr(base, "get_input_embeddings"):
        return None
    embeds = base.get_input_embeddings()
    named = {id(module): name for name, module in model.named_modules()}
    width = int(embeds.embedding_dim)
    return Anatomy(min(stacks), width, entrance=entrance, embedding=named[id(embeds)])


def _attention(block: nn.Module) -> str:
    for name, child in block.named_children():
        if type(child).__name__.endswith("Attention"):
            return name
    return ""
