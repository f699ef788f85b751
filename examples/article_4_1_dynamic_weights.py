"""Section 4.1 of the article: a weight made from a condition.

What the article's own code does wrong: for x of shape (B, 64) its matmul broadcasts to (B, B, 64),
every sample through every sample's weight; and it writes all B weights to memory first.
"""

import torch
from torch import nn

import learnables as ln


class Article(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_weight = nn.Parameter(torch.randn(64, 64))
        self.generator = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64 * 64))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        weight = self.base_weight + self.generator(condition).view(-1, 64, 64)
        return torch.matmul(x, weight)


def main() -> None:
    torch.manual_seed(0)
    x, condition = torch.randn(32, 64), torch.randn(32, 128)
    print("the article:", tuple(Article()(x, condition).shape), "for", tuple(x.shape))
    for kind in ("full", "basis", "low_rank"):
        layer = ln.nn.DynamicLinear(64, 64, condition_features=128, kind=kind)
        optimizer = torch.optim.AdamW(ln.param_groups(layer, lr=3e-3))
        target = torch.roll(x, 1, dims=1) * condition[:, :1]  # depends on both
        for _ in range(30):
            optimizer.zero_grad()
            loss = (layer(x, condition) - target).square().mean()
            loss.backward()
            optimizer.step()
        count = sum(p.numel() for p in layer.parameters())
        shape = tuple(layer(x, condition).shape)
        print(f"{kind:9s} {shape}, {count:7,} values, loss after 30 steps {loss.item():.3f}")
        assert shape == (32, 64)


if __name__ == "__main__":
    main()
