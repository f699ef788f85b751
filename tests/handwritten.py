"""Models as people write them, with nothing declared; also used by ``benchmarks``.

`Handwritten` has 25 parameters, whose kinds have to be recognised: 22 that should not be decayed
toward zero, 3 that should. `HandwrittenViT` is a whole ViT.
"""

import torch
from torch import nn

DECAYED = {"head.weight", "blocks.0.experts", "blocks.0.lora_B"}


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.rms_norm1 = RMSNorm(dim)
        self.norm = nn.LayerNorm(dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))
        self.ls2d = nn.Parameter(torch.full((dim, 1, 1), 1e-5))
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.alpha = nn.Parameter(torch.zeros(1))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(49, heads))
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.sinks = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.zeros(dim, 4))
        self.modulation = nn.Parameter(torch.zeros(6, dim))
        self.experts = nn.Parameter(torch.zeros(2, dim, dim))
        self.lora_B = nn.Parameter(torch.zeros(dim, 2))


class Handwritten(nn.Module):
    def __init__(self, dim: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, dim))
        self.reg_token = nn.Parameter(torch.zeros(1, 4, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.prompt = nn.Parameter(torch.zeros(1, 4, dim))
        self.latents = nn.Parameter(torch.zeros(4, dim))
        self.color_matrix = nn.Parameter(torch.eye(3))
        self.logit_scale = nn.Parameter(torch.tensor(2.65))
        self.freqs = nn.Parameter(torch.zeros(2, 1, 4))
        self.blocks = nn.ModuleList([Block(dim, heads)])
        self.head = nn.Linear(dim, 3)

    def no_weight_decay(self) -> set[str]:  # what timm asks a model for
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.cls_token.expand(len(x_BND), -1, -1), x_BND], 1)
        return self.head(x.mean(1) * self.logit_scale.exp())


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Handwritten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(x)


class ViTBlock(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)
        self.gamma1 = nn.Parameter(torch.full((dim,), 1e-4))
        self.gamma2 = nn.Parameter(torch.full((dim,), 1e-4))

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x_BND)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        out = self.proj(out.transpose(1, 2).flatten(2))
        x_BND = x_BND + self.dropout(self.gamma1 * out)
        mlp = self.fc2(nn.functional.gelu(self.fc1(self.norm2(x_BND))))
        return x_BND + self.dropout(self.gamma2 * mlp)


class HandwrittenViT(nn.Module):
    """A ViT on images of 32 pixels, with 4-pixel patches."""

    def __init__(
        self, dim: int = 64, depth: int = 6, heads: int = 4, ratio: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 65, dim))
        self.blocks = nn.Sequential(*[ViTBlock(dim, heads, ratio, dropout) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x_BND = self.patches(x_BCHW).flatten(2).transpose(1, 2)
        x_BND = torch.cat([self.cls_token.expand(len(x_BND), -1, -1), x_BND], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x_BND))[:, 0])
