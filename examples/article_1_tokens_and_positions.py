"""Section 1 of the article: a class token and position embeddings as parameters.

What the article's own code does wrong: `torch.randn` starts both at a size of 1, where the patches
they are added to have about 0.6, and nothing says that neither should be decayed toward 0.
"""

import torch
from torch import Tensor, nn

import learnables as ln


class Embedding(nn.Module):
    """Patches of an image, with positions, behind a class token."""

    def __init__(self, dim: int, grid: int, article: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        if article:
            self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
            self.pos_embed = nn.Parameter(torch.randn(1, grid * grid + 1, dim))
        else:
            self.cls_token = ln.parameter(
                1, 1, dim, init=ln.init.trunc_normal(0.02), weight_decay=False
            )
            self.pos_embed = ln.nn.Positions2d(grid, dim, prefix=1)  # fits other image sizes too

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, D)
        return self.pos_embed(x) if callable(self.pos_embed) else x + self.pos_embed


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 1, 8, 8)
    for article in (True, False):
        model = Embedding(dim=64, grid=4, article=article)
        content = model.patches(images).std().item()
        table = dict(model.named_parameters())["pos_embed" if article else "pos_embed.table"]
        print(
            f"{'article' if article else 'mended '}: patches {content:.2f}, "
            f"positions {table.std().item():.2f}, so a token is "
            f"{table.var().item() / (content**2 + table.var().item()):.0%} position"
        )
    print(ln.inventory(model))

    larger = Embedding(dim=64, grid=6, article=False)
    larger.load_state_dict(model.state_dict())  # the positions are resampled
    print(f"a table of 4×4 positions loads into one of 6×6: {tuple(larger.pos_embed.table.shape)}")


if __name__ == "__main__":
    main()
