"""A Vision Transformer, read top to bottom.

Tensors carry their shape in their names:

    B batch · C channels · H, W height and width of the image · K classes
    N patches, h · w of them in h rows · R prefix tokens (class token, registers) · T = R + N tokens
    D width · A attention heads · E = D / A width of a head
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import learnables.nn as lnn
from learnables.arguments import (
    require_as_annotated,
    require_choice,
    require_share,
    require_whole,
)
from learnables.declare import parameter
from learnables.errors import ShapeError
from learnables.init.fixed import ones


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a ViT.

    Attributes:
        image_size: Height and width of the images, in pixels.
        channels: 1 for grey, 3 for colour.
        classes: Number of classes.
        patch_size: Height and width of a patch, in pixels; divides both sizes of the image.
        stem: ``"patch"`` embeds each patch by one linear map; ``"conv"`` by a stack of 3×3
            convolutions with stride 2, for a patch size that is a power of 2.
        dim: Width of a token.
        depth: Number of blocks.
        heads: Attention heads; divides ``dim``.
        mlp_ratio: Hidden width of the MLP, as a multiple of ``dim``.
        pool: What the classifier reads: the ``"class"`` token, or the ``"mean"`` of the patches.
        registers: Number of register tokens.
        layer_scale: Where the factors on the branches start; None leaves them out.
        drop_path: Chance that a sample skips a branch of the last block; linear from 0 before.
        qk_norm: Whether queries and keys are normalised.
        color_matrix: Whether a learned colour matrix comes first.

    Raises:
        ArgumentError: A value is of another kind than its field.
        LearnablesError: There is no such stem or pool, or a size is below 1.
        ShapeError: The sizes do not fit each other.
    """

    image_size: tuple[int, int]
    channels: int
    classes: int
    patch_size: int = 4
    stem: Literal["patch", "conv"] = "patch"
    dim: int = 64
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 2.0
    pool: Literal["class", "mean"] = "class"
    registers: int = 0
    layer_scale: float | None = None
    drop_path: float = 0.0
    qk_norm: bool = False
    color_matrix: bool = True

    def __post_init__(self) -> None:
        require_as_annotated(type(self), (), vars(self))
        require_choice("stem", self.stem, ("patch", "conv"))
        require_choice("pool", self.pool, ("class", "mean"))
        for name in ("channels", "classes", "dim", "heads"):
            require_whole(getattr(self, name), name, least=1)
        require_share(self.drop_path, "drop_path")
        if not self.mlp_ratio > 0:
            raise ShapeError(
                "the hidden width of the MLP is a positive multiple of dim",
                where="mlp_ratio",
                found=f"mlp_ratio={self.mlp_ratio}",
                wanted="> 0",
            )
        height, width = self.image_size
        p = self.patch_size
        if p < 1 or height % p or width % p:
            raise ShapeError(
                "the patches do not tile the image",
                found=f"images of {height}×{width} pixels, patches of {p}×{p}",
                wanted="a patch size that divides both",
            )
        if self.stem == "conv" and (p < 2 or p & (p - 1)):
            raise ShapeError(
                "a convolutional stem halves the image some times",
                found=f"patch_size={p}",
                wanted="a power of 2, at least 2",
            )
        if self.dim % self.heads:
            raise ShapeError(
                "the heads do not share the width equally",
                found=f"dim={self.dim}, heads={self.heads}",
                wanted="a number of heads that divides dim",
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


@final
class ViT(nn.Module):
    """Images in, class scores out.

    A checkpoint of another image size loads: the position table is resampled.

    Args:
        config: The shape.
        mean: Mean of each channel of the images. Shape ``(C,)``; 0.5 when None.
        std: Their standard deviation; 0.5 when None. Both are buffers, so a saved model takes raw
            images.

    Source:
        Dosovitskiy et al., *An Image is Worth 16x16 Words*, arXiv:2010.11929. Pre-norm blocks, no
        bias in queries, keys and values: softmax ignores that of the keys.

    Example:
        >>> config = ViTConfig(image_size=(8, 8), channels=1, classes=10, patch_size=2, registers=2)
        >>> ViT(config)(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, config: ViTConfig, mean: Tensor | None = None, std: Tensor | None = None
    ) -> None:
        super().__init__()
        require_as_annotated(type(self), (config,), {})
        c = self.config = config
        half = torch.full((c.channels,), 0.5)
        self.register_buffer("mean", half.clone() if mean is None else mean.clone())
        self.register_buffer("std", half.clone() if std is None else std.clone())

        self.color_matrix = lnn.ColorMatrix(c.channels) if c.color_matrix else nn.Identity()
        stem = PatchStem if c.stem == "patch" else ConvStem
        self.stem = stem(c.channels, c.dim, c.patch_size)
        self.positions = lnn.Positions2d(c.grid, c.dim)
        self.registers = lnn.RegisterTokens(c.registers, c.dim) if c.registers else nn.Identity()
        self.class_token = lnn.ClassToken(c.dim) if c.pool == "class" else nn.Identity()
        self.num_prefix = c.registers + (c.pool == "class")

        self.blocks = nn.Sequential(*(Block(c, index) for index in range(c.depth)))
        self.norm = nn.LayerNorm(c.dim)
        self.head = nn.Linear(c.dim, c.classes)
        self.apply(_initialise)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Scores before softmax.

        Args:
            images_BCHW: Images in [0, 1]. Shape ``(B, C, H, W)``.

        Returns:
            Shape ``(B, K)``.
        """
        x_BCHW = (images_BCHW - self.mean[:, None, None]) / self.std[:, None, None]
        x_BND = self.stem(self.color_matrix(x_BCHW))
        x_BND = self.positions(x_BND)
        x_BTD = self.class_token(self.registers(x_BND))
        x_BTD = self.norm(self.blocks(x_BTD))
        if self.config.pool == "class":
            pooled_BD = x_BTD[:, 0]
        else:
            pooled_BD = x_BTD[:, self.num_prefix :].mean(1)
        scores_BK: Tensor = self.head(pooled_BD)
        return scores_BK


@final
class PatchStem(nn.Module):
    """Each patch through one linear map, written as a convolution that does not overlap."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, dim, patch_size, patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) → (B, N, D)."""
        x_BDhw: Tensor = self.project(x_BCHW)
        return x_BDhw.flatten(2).transpose(1, 2)


@final
class ConvStem(nn.Module):
    """The image halved by 3×3 convolutions until one pixel is one patch.

    Source:
        Xiao et al., *Early Convolutions Help Transformers See Better*, arXiv:2106.14881. Here
        without batch norm, so that an answer does not depend on the rest of the batch.
    """

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        halvings = patch_size.bit_length() - 1
        widths = [channels, *(dim >> (halvings - 1 - i) for i in range(halvings))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) → (B, N, D)."""
        x_BDhw: Tensor = self.layers(x_BCHW)
        return x_BDhw.flatten(2).transpose(1, 2)


@final
class Block(nn.Module):
    """Attention, then an MLP, each on a residual branch."""

    def __init__(self, config: ViTConfig, index: int) -> None:
        super().__init__()
        dim, hidden = config.dim, round(config.dim * config.mlp_ratio)
        self.drop_path = config.drop_path * index / max(1, config.depth - 1)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, config.heads, qk_norm=config.qk_norm)
        self.scale1 = _scale(dim, config.layer_scale)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.scale2 = _scale(dim, config.layer_scale)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        x_BTD = x_BTD + self._dropped(self.scale1(self.attention(self.norm1(x_BTD))))
        return x_BTD + self._dropped(self.scale2(self.mlp(self.norm2(x_BTD))))

    def _dropped(self, branch_BTD: Tensor) -> Tensor:
        """Stochastic depth: the branch is skipped for some samples, and stronger for the others.

        Source:
            Huang et al., *Deep Networks with Stochastic Depth*, arXiv:1603.09382.
        """
        if not self.training or self.drop_path == 0.0:
            return branch_BTD
        keep = 1.0 - self.drop_path
        mask_B11 = branch_BTD.new_empty(len(branch_BTD), 1, 1).bernoulli_(keep)
        return branch_BTD * mask_B11 / keep


@final
class Attention(nn.Module):
    """Every token looks at every other, with several heads.

    Source:
        Vaswani et al., *Attention Is All You Need*, arXiv:1706.03762; the norm of queries and keys
        from Dehghani et al., *Scaling Vision Transformers to 22 Billion Parameters*,
        arXiv:2302.05442.
    """

    def __init__(self, dim: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm_q = HeadNorm(dim // heads) if qk_norm else nn.Identity()
        self.norm_k = HeadNorm(dim // heads) if qk_norm else nn.Identity()
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        qkv_3BATE = self.qkv(x_BTD).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q_BATE, k_BATE, v_BATE = qkv_3BATE.unbind(0)
        q_BATE, k_BATE = self.norm_q(q_BATE), self.norm_k(k_BATE)
        y_BATE = F.scaled_dot_product_attention(q_BATE, k_BATE, v_BATE)
        y_BTD: Tensor = self.out(y_BATE.transpose(1, 2).flatten(2))
        return y_BTD


@final
class HeadNorm(nn.Module):
    """Root-mean-square norm of each head's queries or keys, in the dtype they have.

    Source:
        Zhang and Sennrich, *Root Mean Square Layer Normalization*, arXiv:1910.07467.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = parameter(head_dim, init=ones(), weight_decay=False)

    def forward(self, x_BATE: Tensor) -> Tensor:
        """(B, A, T, E) → (B, A, T, E); computed in fp32 inside."""
        # nn.RMSNorm leaves the fused path, and warns, where autocast has made x half precision.
        return F.rms_norm(x_BATE, x_BATE.shape[-1:], self.weight.to(x_BATE.dtype))


def _scale(dim: int, value: float | None) -> nn.Module:
    return nn.Identity() if value is None else lnn.LayerScale(dim, value)


def _initialise(module: nn.Module) -> None:
    """Xavier for every linear map, as in big_vision; a stem counts as the linear map it is."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.detach().flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
