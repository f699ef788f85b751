"""What low precision loses, what keeping it costs, what one float32 parameter does to a stream.

    python benchmarks/precision.py                       # what is counted: a minute
    python benchmarks/precision.py --only promotions     # one part of it
    python benchmarks/precision.py --only times          # seconds: four minutes, a quiet machine

Counted are distances from the float32 trajectory, bytes that lie in parameters, gradients and
optimizer state, and bytes that autograd keeps. Seconds are CPU seconds of one thread.
"""

import argparse
import copy
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from environment import paired, save_part
from tests.handwritten import HandwrittenViT

import learnables as ln
from learnables.models.vit import ViT, ViTConfig

BF16, FP32 = torch.bfloat16, torch.float32
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "kahan": {"rounding": "kahan"},
    "stochastic": {"rounding": "stochastic"},
    "master": {"rounding": "master"},
    "kahan, state float32": {"rounding": "kahan", "state_dtype": FP32},
    "stochastic, state float32": {"rounding": "stochastic", "state_dtype": FP32},
    "master, state float32": {"rounding": "master", "state_dtype": FP32},
}


class Scaled(nn.Module):
    """Regression with a gamma of 1 on a linear map, and weights of usual size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 256), nn.Linear(256, 1)
        self.gamma = nn.Parameter(torch.ones(256))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)) * self.gamma)


def trained(dtype: torch.dtype, way: dict[str, Any] | None, steps: int = 100) -> list[Tensor]:
    """``gamma`` after each step; the same data for all."""
    torch.manual_seed(0)
    model = Scaled().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    if way is not None:
        ln.attach(model, optimizer, **way)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(512, 32, generator=g)
    y = torch.sin(x[:, :1] * 2) + x[:, 1:2]
    path = []
    for step in range(steps):
        rows = slice(64 * (step % 8), 64 * (step % 8) + 64)
        optimizer.zero_grad()
        (model(x[rows].to(dtype)).float() - y[rows]).square().mean().backward()
        optimizer.step()
        path.append(model.gamma.detach().float().clone())
    return path


def trajectories() -> dict[str, dict[str, float]]:
    """How far gamma, as a whole and per entry, is from where float32 leads it."""
    exact = trained(FP32, None)
    rows = {}
    for name, way in WAYS.items():
        path = trained(BF16, way)
        away = [(a - b).norm() / b.norm() for a, b in zip(path, exact, strict=True)]
        moved = (path[-1] - 1).norm() / (exact[-1] - 1).norm()
        rows[name] = {
            "mean_away_at_most": max(
                abs(float(a.mean() / b.mean()) - 1) for a, b in zip(path, exact, strict=True)
            ),
            "away_at_most": float(max(away)),
            "worst_entry": float((path[-1] / exact[-1] - 1).abs().max()),
            "way_gone": float(moved),
            "never_moved": float((path[-1] == 1).float().mean()),
        }
    rows["least of what is drawn"] = {"away_at_most": least_deviation(exact)}
    return rows


def least_deviation(path: list[Tensor]) -> float:
    """How far a rounding that is right in the mean, and remembers nothing, strays from ``path``.

    Of all that give a number between two neighbours u apart on the average, the one that takes one
    of the two has the least variance: u² f (1 - f), where f is how far the number is from the lower
    one, in u. From a number that is one of them a step of s ends at f = |s| / u, if it is below u.
    """
    variance = torch.zeros(())
    for before, after in itertools.pairwise([torch.ones_like(path[0]), *path]):
        toward = torch.where(after < before, before * (1 - 1e-7), before)
        unit = torch.ldexp(torch.ones_like(before), torch.frexp(toward)[1] - 8)
        f = ((after - before).abs() / unit).frac()
        variance = variance + (unit**2 * f * (1 - f)).sum()
    return float(variance.sqrt() / path[-1].norm())


def vit(dim: int, depth: int = 6) -> ViT:
    torch.manual_seed(0)
    return ViT(
        ViTConfig((32, 32), 3, 10, dim=dim, depth=depth, layer_scale=1e-4, color_matrix=False)
    )


def bytes_per_parameter(dim: int) -> dict[str, dict[str, float]]:
    """What lies in parameters, gradients and optimizer state after a step, counted."""

    def size(dtype: torch.dtype, way: dict[str, Any] | None) -> dict[str, float]:
        model = vit(dim).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
        if way is not None:
            ln.attach(model, optimizer, **way)
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-3)
        optimizer.step()
        params = list(model.parameters())
        count = sum(p.numel() for p in params)
        state = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
        parts = {"parameter": params, "gradient": [p.grad for p in params], "state": state}
        found = {k: sum(x.nbytes for x in some if x is not None) for k, some in parts.items()}
        return {**{k: n / count for k, n in found.items()}, "all": sum(found.values()) / count}

    rows = {"float32": size(FP32, None)}
    return {**rows, **{f"bfloat16 {name}": size(BF16, way) for name, way in WAYS.items()}}


def kept_for_backward(model: nn.Module, x: Tensor) -> int:
    """Bytes of all distinct memory that autograd keeps, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(t)
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, torch.autocast("cpu", BF16):
        model(x)
    return sum(kept.values())


def looked_at(model: nn.Module, x: Tensor) -> ln.promotions:
    with ln.promotions(model) as seen, torch.autocast("cpu", BF16):
        model(x)
    return seen


def promotions(dim: int, batch: int) -> dict[str, dict[str, Any]]:
    """A ViT as people write it before and after typing the mend, and ours."""
    x = torch.randn(batch, 3, 32, 32)
    rows: dict[str, dict[str, Any]] = {}
    for ratio, dropout in itertools.product((4, 2, 1), (0.0, 0.1)):
        torch.manual_seed(0)
        model = HandwrittenViT(dim=dim, ratio=ratio, dropout=dropout)
        before, size = looked_at(model, x), kept_for_backward(model, x)
        blamed = list(before.parameters)
        seen = before
        while seen.found:  # what one parameter hid comes to light when it is mended
            exec(seen.mend, {"ln": ln, "model": model})
            seen = looked_at(model, x)
            blamed += [name for name in seen.parameters if name not in blamed]
        after = kept_for_backward(model, x)
        rows[f"MLP of {ratio} widths, dropout {dropout:g}"] = {
            "promotions": len(before.found),
            "parameters": len(blamed),
            "promotions_after": len(seen.found),
            "bytes": size,
            "bytes_after": after,
            "smaller": 1 - after / size,
        }
    ours = vit(dim)
    rows["learnables.models.ViT"] = {
        "promotions": len(looked_at(ours, x).found),
        "bytes": kept_for_backward(ours, x),
    }
    return rows


def stepper(dim: int, way: dict[str, Any] | None, batch: int, **options: Any) -> Callable[[], None]:
    """One optimizer step of a ViT in bfloat16; with ``batch``, the whole training step."""
    model = vit(dim).to(BF16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    if way is not None:
        ln.attach(model, optimizer, **way)
    x, y = torch.randn(max(batch, 1), 3, 32, 32).to(BF16), torch.randint(10, (max(batch, 1),))
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3

    def step() -> None:
        if batch:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()

    step()
    return step


def times(dim: int, batch: int, rounds: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for kind, options in (("foreach", {"foreach": True}), ("fused", {"fused": True})):
        for what, size in (("optimizer step", 0), ("training step", batch)):
            base = stepper(dim, None, size, **options)
            ways = {k: w for k, w in WAYS.items() if w is not None}
            tasks = {name: stepper(dim, way, size, **options) for name, way in ways.items()}
            rows[f"{what}, {kind}"] = paired(base, tasks, rounds=rounds, seconds=6.0)
    return rows


def print_trajectories(rows: dict[str, Any]) -> None:
    print(
        "| gamma = 1, AdamW lr 1e-3, 100 steps | its mean away from float32 | its entries | stuck |"
    )
    print("|---|---|---|---|")
    for name, row in rows.items():
        mean, stuck = row.get("mean_away_at_most"), row.get("never_moved")
        cells = ["" if mean is None else f"{mean:.3%}", f"{row['away_at_most']:.2%}"]
        print(f"| {name} | {' | '.join(cells)} | {'' if stuck is None else f'{stuck:.0%}'} |")


def print_bytes(rows: dict[str, Any]) -> None:
    print("| bytes per parameter | parameter | gradient | state | all |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")


def print_promotions(rows: dict[str, Any]) -> None:
    print("| under bf16 autocast | promotions | after | kept for backward | after | smaller |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        after = row.get("bytes_after", row["bytes"])
        print(
            f"| {name} | {row['promotions']} | {row.get('promotions_after', 0)} | "
            f"{row['bytes'] / 1e6:.1f} MB | {after / 1e6:.1f} MB | {1 - after / row['bytes']:.1%} |"
        )


def print_times(rows: dict[str, Any]) -> None:
    print("| × plain bfloat16 | " + " | ".join(rows) + " |\n|---|" + "---|" * len(rows))
    for name in [name for name, way in WAYS.items() if way is not None]:
        cells = [copy.copy(timings[name]) for timings in rows.values()]
        print(f"| {name} | " + " | ".join(f"{cell.ratio:.2f}" for cell in cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ("trajectories", "bytes", "promotions", "times")
    parser.add_argument("--only", nargs="*", choices=names, default=names[:3])
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], None]]] = {
        "trajectories": (trajectories, print_trajectories),
        "bytes": (lambda: bytes_per_parameter(args.dim), print_bytes),
        "promotions": (lambda: promotions(64, 32), print_promotions),
        "times": (lambda: times(args.dim, args.batch, args.rounds), print_times),
    }
    for name in args.only:
        measure, show = parts[name]
        rows = measure()
        show(rows)
        print()
        save_part("precision", name, rows, dim=args.dim, batch=args.batch)


if __name__ == "__main__":
    main()
