"""Section 5.2 of the article: block-sparse weights, trained on handwritten digits.

What the article's own code does wrong: its "sparse" Parameter of shape (16, 16, 64, 64) holds every
block, and multiplies every block; nothing about it is sparse but the name. And `randn` makes its
first output 32 times too large.

Here the same 1024 × 1024 matrix stands in the middle of a small network. Printed for each form:
what it stores, the bytes of values, gradients and AdamW's state, its time for a step of the whole
network, and how many digits the network reads right.
"""

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import learnables as ln
from learnables.recipes.vit.data import load_images

BATCH = 256


class Article(nn.Module):
    """As it is written there."""

    def __init__(self) -> None:
        super().__init__()
        self.block_sparse = nn.Parameter(torch.randn(16, 16, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.block_sparse.permute(0, 2, 1, 3).reshape(1024, 1024))


def block_sparse() -> nn.Module:
    return ln.nn.BlockSparseLinear(1024, 1024, block=64, density=0.125, bias=False)


FORMS: dict[str, Callable[[], nn.Module]] = {
    "the article": Article,
    "nn.Linear": lambda: nn.Linear(1024, 1024, bias=False),
    "BlockSparseLinear": block_sparse,
    "BlockSparseLinear, RigL": block_sparse,
}


def main(steps: int) -> None:
    digits = load_images("digits")
    x_train, x_test = (split.images.flatten(1) / 128.0 - 1 for split in (digits.train, digits.test))
    y_train, y_test = digits.train.labels, digits.test.labels
    print("                           values      bytes       step   read right")
    for name, make in FORMS.items():
        torch.manual_seed(0)
        middle = make()
        model = nn.Sequential(
            *(nn.Linear(64, 1024), nn.GELU(), middle, nn.GELU(), nn.Linear(1024, 10))
        )
        optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3, weight_decay=0.01))
        if name.endswith("RigL"):  # a tenth of the blocks is exchanged, later fewer
            every, until = max(1, steps // 20), max(1, steps * 3 // 4)
            ln.sparse.evolve(model, optimizer, ln.sparse.RigL(0.1), every=every, until=until)
        seconds = 0.0
        for _ in range(steps):
            rows = torch.randint(len(x_train), (BATCH,))
            begun = time.process_time()
            optimizer.zero_grad()
            F.cross_entropy(model(x_train[rows]), y_train[rows]).backward()
            optimizer.step()
            seconds += time.process_time() - begun
        model.eval()
        with torch.no_grad():
            right = (model(x_test).argmax(1) == y_test).float().mean().item()
        (weight,) = middle.parameters()
        held = [*middle.buffers(), weight, weight.grad, *optimizer.state[weight].values()]
        size = sum(t.nbytes for t in held)
        print(
            f"{name:23} {weight.numel():9,} {size / 1e6:7.2f} MB {1e3 * seconds / steps:7.2f} ms "
            f"{right:12.1%}"
        )
    assert weight.numel() == 1024 * 1024 // 8
    dense = F.linear(x_test.repeat(1, 16), middle.dense())
    torch.testing.assert_close(middle(x_test.repeat(1, 16)), dense, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    main(steps=int(sys.argv[1]) if len(sys.argv) > 1 else 150)
