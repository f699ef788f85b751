"""Section 2.2 of the article: how to fill a parameter.

What the article's own code does wrong: torch.Tensor(3, 3) is uninitialised memory until the next
line, and orthogonal_ of a stack of matrices flattens it, so that no matrix of it is orthogonal.
"""

import torch
from torch import nn

import learnables as ln


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.uniform = ln.parameter(3, 3, init=ln.init.uniform(-0.1, 0.1))
        self.xavier = ln.parameter(64, 32, init=ln.init.xavier_normal(), role="linear")
        self.heads = ln.parameter(48, 64, 64, init=ln.init.orthogonal())
        self.bias = ln.parameter(3, init=ln.init.zeros())


def main() -> None:
    torch.manual_seed(0)
    layer = Layer()
    print(ln.init.report(layer))
    heads = layer.heads.detach()
    defect = (heads.mT @ heads - torch.eye(64)).norm(dim=(1, 2)).max()
    print(f"48 matrices, each orthogonal: largest ‖WᵀW − I‖ = {defect:.1e}")
    flat = nn.init.orthogonal_(torch.empty(48, 64, 64))
    wrong = (flat.mT @ flat - torch.eye(64)).norm(dim=(1, 2)).min()
    print(f"torch.nn.init.orthogonal_ of the same stack: smallest defect {wrong:.1f}")


if __name__ == "__main__":
    main()
