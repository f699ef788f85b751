"""What watching costs: bytes of a record, seconds of a look, slowdown of a training.

    python benchmarks/watch.py

The slowdown is that of a small ViT, where the default watcher costs most: pairs of short trainings,
watched and not, in turns. `learnables.watch` prints beside it how often its governor looked.
"""

import sqlite3
import statistics
import tempfile
import time

import torch
from environment import save
from torch import nn

import learnables as ln
from learnables.models.vit import ViT, ViTConfig
from learnables.watching import Run

PAIRS, STEPS = 20, 150


def vit_b() -> nn.Module:
    """The 152 parameters of a ViT-B/16, with gradients; no module that computes is needed."""
    model = nn.Module()
    dim, shapes = 768, {"cls_token": (1, 1, 768), "pos_embed": (1, 197, 768)}
    shapes |= {"patch_weight": (dim, 3, 16, 16), "patch_bias": (dim,)}
    for i in range(12):
        for name, shape in (
            ("qkv", (3 * dim, dim)),
            ("proj", (dim, dim)),
            ("fc1", (4 * dim, dim)),
            ("fc2", (dim, 4 * dim)),
        ):
            shapes |= {f"{name}_{i}": shape, f"{name}_bias_{i}": shape[:1]}
        shapes |= {f"norm{k}_{part}_{i}": (dim,) for k in (1, 2) for part in ("weight", "bias")}
    shapes |= {"norm": (dim,), "norm_bias": (dim,), "head": (1000, dim), "head_bias": (1000,)}
    for name, shape in shapes.items():
        p = nn.Parameter(torch.randn(shape) * 0.02)
        p.grad = torch.randn(shape) * torch.rand(shape) ** 3 * 1e-3
        model.register_parameter(name, p)
    return model


def record() -> dict[str, float]:
    """Size of the record of one look at ViT-B, and its time in reads of the memory."""
    model = vit_b()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        with ln.watch(model, optimizer, every=1, to=folder, budget=None) as watcher:
            for _ in range(3):
                optimizer.step()
            seconds = watcher.governor.clocks()[3]
        database = sqlite3.connect(Run(folder).path)
        (size,) = database.execute(
            "SELECT avg(length(numbers) + length(rows)) FROM observations"
        ).fetchone()
        database.close()
    return {"bytes": size, "look_seconds": seconds, "parameters": len(list(model.parameters()))}


def train(watched: bool) -> float:
    """Seconds of a short training."""
    torch.manual_seed(0)
    config = ViTConfig(image_size=(8, 8), channels=1, classes=10, patch_size=2, dim=64, depth=4)
    model = ViT(config)
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3))
    images, labels = torch.rand(64, 1, 8, 8), torch.randint(10, (64,))
    with tempfile.TemporaryDirectory() as folder:
        watcher = ln.watch(model, optimizer, to=folder) if watched else None
        begun = time.perf_counter()
        for _ in range(STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        seconds = time.perf_counter() - begun
        if watcher:
            watcher.close()
    return seconds


def slowdown() -> dict[str, float]:
    train(watched=True)
    ratios = [train(watched=True) / train(watched=False) - 1 for _ in range(PAIRS)]
    mean = statistics.fmean(ratios)
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    upper = mean + 1.73 * error  # one-sided 95 %, 19 degrees of freedom
    return {"mean": mean, "upper_95": upper, "pairs": PAIRS, "steps": STEPS}


def main() -> None:
    size, cost = record(), slowdown()
    print(
        f"record of one look at ViT-B: {size['bytes'] / 1000:.1f} kB, {size['look_seconds']:.2f} s"
    )
    print(f"slowdown, small ViT: mean {cost['mean']:.2%}, 95 % upper bound {cost['upper_95']:.2%}")
    save("watch", {"record": size, "slowdown": cost})


if __name__ == "__main__":
    main()
