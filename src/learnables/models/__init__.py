"""Whole models, each read top to bottom in one file."""

from learnables.models.vit import ViT, ViTConfig

__all__ = ["ViT", "ViTConfig"]
