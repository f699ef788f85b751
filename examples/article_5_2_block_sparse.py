"""Section 5.2 of the article: block-sparse weights.

What the article's own code does wrong: its "sparse" Parameter of shape (16, 16, 64, 64) holds every
block, and multiplies every block; nothing about it is sparse but the name.
"""

import torch
from torch import nn

import learnables as ln


def main() -> None:
    torch.manual_seed(0)
    article = nn.Parameter(torch.randn(16, 16, 64, 64))
    layer = ln.nn.BlockSparseLinear(1024, 1024, block=64, density=0.125, bias=False)
    print(f"the article stores {article.numel():,} values, the layer {layer.weight.numel():,}")
    x = torch.randn(32, 1024)
    torch.testing.assert_close(layer(x), x @ layer.dense().T, rtol=1e-3, atol=1e-4)

    teacher = layer.dense().detach() + 0.01 * torch.randn(1024, 1024)
    optimizer = torch.optim.AdamW(ln.param_groups(layer, lr=1e-3))
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - x @ teacher.T).square().mean()
        loss.backward()
        optimizer.step()
    print(
        f"loss after 20 steps {loss.item():.4f}; gradient of shape {tuple(layer.weight.grad.shape)}"
    )


if __name__ == "__main__":
    main()
