"""Section 4.1 of the article: a weight made from a condition, trained on handwritten digits.

What the article's own code does wrong: for x of shape (B, 64) its matmul broadcasts to (B, B, 64),
every sample through every sample's weight; and it writes all B weights to memory first.

Here each digit is turned or mirrored in one of eight ways, and the condition says which: a weight
that depends on it can turn the picture back. Printed for each way to make that weight: what it
stores, what it keeps for backward, its time for a step, and how many digits it reads right.
"""

import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import learnables as ln
from learnables.recipes.vit.data import load_images

BATCH = 128


class Article(nn.Module):
    """As it is written there."""

    def __init__(self) -> None:
        super().__init__()
        self.base_weight = nn.Parameter(torch.randn(64, 64))
        self.generator = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64 * 64))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        weight = self.base_weight + self.generator(condition).view(-1, 64, 64)
        return torch.matmul(x, weight)


class Corrected(Article):
    """Each sample through its own weight only, and a base that starts as small as a Linear's."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.uniform_(self.base_weight, -1 / 8, 1 / 8)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(1), condition).squeeze(1)


class FixedWeight(nn.Linear):
    """What one weight for all conditions can do."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x)


def turned(images: Tensor, view: Tensor) -> Tensor:
    """Image b in the view of number ``view[b]``: four turns, each also mirrored. → (B, 64)."""
    views = [torch.rot90(m, k, (1, 2)) for m in (images, images.flip(2)) for k in range(4)]
    return torch.stack(views)[view, torch.arange(len(view))].flatten(1)


def main(steps: int) -> None:
    digits = load_images("digits")
    pictures, labels = digits.train.images[:, 0] / 128.0 - 1, digits.train.labels
    codes = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))  # one for each view

    test_view = torch.arange(8).repeat_interleave(len(digits.test))
    test_x = turned((digits.test.images[:, 0] / 128.0 - 1).repeat(8, 1, 1), test_view)
    test_y = digits.test.labels.repeat(8)

    shape = tuple(Article()(test_x[:BATCH], codes[test_view[:BATCH]]).shape)
    print(f"the article's layer makes {shape} of {(BATCH, 64)}: it cannot be trained on one label")
    print("                        values   kept for backward   step     read right")
    accuracy = {}
    for name, make in {
        "one fixed weight": lambda: FixedWeight(64, 64),
        "the article, corrected": Corrected,
        **{
            f"DynamicLinear, {kind}": lambda kind=kind: ln.nn.DynamicLinear(
                64, 64, condition_features=128, hidden_features=256, kind=kind
            )
            for kind in ("full", "basis", "low_rank")
        },
    }.items():
        torch.manual_seed(0)
        layer, head = make(), nn.Linear(64, 10)
        model = nn.ModuleList([layer, head])
        optimizer = torch.optim.AdamW(ln.param_groups(model, lr=2e-3, weight_decay=0.01))
        seconds = 0.0
        for _ in range(steps):
            rows, view = torch.randint(len(labels), (BATCH,)), torch.randint(8, (BATCH,))
            x, condition = turned(pictures[rows], view), codes[view]
            begun = time.process_time()
            optimizer.zero_grad()
            loss = F.cross_entropy(head(F.relu(layer(x, condition))), labels[rows])
            loss.backward()
            optimizer.step()
            seconds += time.process_time() - begun
        with torch.no_grad():
            guess = head(F.relu(layer(test_x, codes[test_view]))).argmax(1)
        accuracy[name] = (guess == test_y).float().mean().item()
        count = sum(p.numel() for p in layer.parameters())
        kept = kept_for_backward(layer, test_x[:BATCH], codes[test_view[:BATCH]])
        print(
            f"{name:23} {count:9,} {kept / 1e6:13.3f} MB {1e3 * seconds / steps:9.2f} ms "
            f"{accuracy[name]:10.1%}"
        )
    if steps >= 100:
        assert accuracy["DynamicLinear, basis"] > accuracy["one fixed weight"] + 0.05


def kept_for_backward(layer: nn.Module, x: Tensor, condition: Tensor) -> int:
    """Bytes that autograd keeps beside the parameters and the inputs."""
    x = x.clone().requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), x, condition)}
    found = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, condition)  # x as a layer below would give it: with a gradient to come
    return sum(found.values())


if __name__ == "__main__":
    main(steps=int(sys.argv[1]) if len(sys.argv) > 1 else 300)
