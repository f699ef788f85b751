"""A model of 25 hand-written parameters: 22 that should not be decayed toward zero, 3 that should.

None of them is declared; kinds have to be recognised. Also used by ``benchmarks/decay.py``.
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
