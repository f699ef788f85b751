"""What initialisers do to gradients and to learning, on nets of the size of digits.

Writes results/init.json; ``python -m tests.init.page`` puts the numbers into docs/en/init.md.
Minutes on one core. Every number is a median over the seeds; the split is fixed.

    python benchmarks/init.py           # everything
    python benchmarks/init.py tokens    # one section anew, the others kept
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from environment import RESULTS, save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import learnables as ln
from learnables.init.base import Init, Initializer, initialise_

SEEDS = (0, 1, 2)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (N, 8, 8) and labels; one stratified fifth is the test set."""
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    x = (x - x.mean()) / x.std()
    train, test = train_test_split(range(len(y)), test_size=0.2, stratify=y, random_state=0)
    return x[train], y[train], x[test], y[test]


TRAIN_X, TRAIN_Y, TEST_X, TEST_Y = digits()


def accuracy(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        right = (model(TEST_X).argmax(1) == TEST_Y).float().mean().item()
    model.train()
    return 100 * right


def epochs(model: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> Iterator[int]:
    for epoch in range(n):
        for picked in torch.randperm(len(TRAIN_X)).split(64):
            loss = F.cross_entropy(model(TRAIN_X[picked]), TRAIN_Y[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield epoch + 1


def median(of: Callable[[int], dict[str, float]]) -> dict[str, float | str]:
    """Run once for each seed; the median of every number that comes back."""
    runs = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        runs.append(of(seed))
    return {name: _plain(statistics.median(run[name] for run in runs)) for name in runs[0]}


def _plain(number: float) -> float | str:
    """Four digits; JSON knows no infinity."""
    return float(f"{number:.4g}") if math.isfinite(number) else str(number)


# --- 1. depth: thirty plain layers -----------------------------------------------------------


class Plain(nn.Module):
    """Depth without shortcuts or norms: what the initialiser gets wrong, nothing repairs."""

    def __init__(self, init: Init, act: Callable[[Tensor], Tensor], depth: int = 30) -> None:
        super().__init__()
        self.act = act
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        self.head = nn.Linear(64, 10)
        for layer in self.layers:
            initialise_(layer.weight, init)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = self.act(layer(x))
        return self.head(x)


def depth_rows() -> list[dict[str, Any]]:
    gains = {"tanh": nn.init.calculate_gain("tanh"), "relu": 2**0.5}
    rows = []
    for name, act in (("tanh", torch.tanh), ("relu", torch.relu)):
        gain = gains[name]
        inits: list[Initializer] = [
            ln.init.normal(1.0),
            ln.init.normal(0.02),
            ln.init.kaiming_uniform(a=5**0.5),  # what nn.Linear does by default
            ln.init.xavier_uniform(),
            ln.init.xavier_uniform(gain),
            ln.init.variance_scaling(gain**2),  # Kaiming
            ln.init.orthogonal(),
            ln.init.orthogonal(gain),
        ]
        for init in inits:

            def run(seed: int, init: Init = init, act: Any = act) -> dict[str, float]:
                model = Plain(init, act)
                F.cross_entropy(model(TRAIN_X[:512]), TRAIN_Y[:512]).backward()
                norms = [layer.weight.grad.norm().item() for layer in model.layers]
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
                for _ in epochs(model, optimizer, 10):
                    pass
                return {
                    "first": norms[0],
                    "middle": norms[len(norms) // 2],
                    "last": norms[-1],
                    "accuracy": accuracy(model),
                }

            rows.append({"activation": name, "init": repr(init), **median(run)})
            print(rows[-1])
    return rows


# --- 2. tokens and positions of a small ViT ----------------------------------------------------


class Block(nn.Module):
    def __init__(self, dim: int, scale: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.scale1, self.scale2 = scale, scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.scale1(self.out(attended))
        return x + self.scale2(self.mlp(self.norm2(x)))


class Small(nn.Module):
    """Patches of 2 × 2, a class token, three blocks."""

    def __init__(self, tokens: Init, positions: Init, dim: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 2, stride=2)
        self.cls = ln.nn.ClassToken(dim, init=tokens)
        self.positions = ln.nn.Positions2d(4, dim, prefix=1, init=positions)
        self.blocks = nn.Sequential(*[Block(dim, nn.Identity()) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def embedded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.patches(x[:, None]).flatten(2).mT
        return patches, self.positions(self.cls(patches))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedded(x)[1])[:, 0]))


def token_rows() -> list[dict[str, Any]]:
    rows = []
    usual = ln.init.normal(0.02)
    cases: list[tuple[Initializer, Initializer]] = [
        *((ln.init.normal(std), usual) for std in (1.0, 0.02, 1e-6)),
        *((usual, ln.init.normal(std)) for std in (1.0, 0.2, 1e-6)),
        (usual, ln.init.zeros()),
        (usual, ln.init.sincos2d((4, 4), prefix=1)),
    ]
    for tokens, positions in cases:

        def run(seed: int, case: tuple[Init, Init] = (tokens, positions)) -> dict[str, float]:
            model = Small(*case)
            with torch.no_grad():
                patches, _ = model.embedded(TRAIN_X)
            F.cross_entropy(model(TRAIN_X[:512]), TRAIN_Y[:512]).backward()
            found = {
                "patch_std": patches.std().item(),
                "cls_grad": model.cls.tokens.grad.norm().item(),
                "positions_grad": model.positions.table.grad.norm().item(),
            }
            optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3, weight_decay=0.05))
            for epoch in epochs(model, optimizer, 20):
                if epoch in (5, 20):
                    found[f"accuracy_{epoch}"] = accuracy(model)
            found["positions_std_after"] = model.positions.table.std().item()
            found["tokens_std_after"] = model.cls.tokens.std().item()
            return found

        rows.append({"tokens": repr(tokens), "positions": repr(positions), **median(run)})
        print(rows[-1])
    return rows


# --- 3. gates and layer scales on a deep residual net ------------------------------------------


class Residual(nn.Module):
    """Twenty residual MLP blocks, each behind a scale; no warm-up, a large step."""

    def __init__(self, scale: Callable[[int], nn.Module], norm: bool, depth: int = 20) -> None:
        super().__init__()
        dim = 64
        self.scales = nn.ModuleList(scale(dim) for _ in range(depth))
        self.norms = nn.ModuleList(
            nn.LayerNorm(dim) if norm else nn.Identity() for _ in range(depth)
        )
        self.inner = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.outer = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        for layer in [*self.inner, *self.outer]:
            initialise_(layer.weight, ln.init.kaiming_normal())
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for scale, norm, inner, outer in zip(
            self.scales, self.norms, self.inner, self.outer, strict=True
        ):
            x = x + scale(outer(torch.relu(inner(norm(x)))))
        return self.head(x)


SCALES: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda dim: nn.Identity(),
    "LayerScale(0.1)": lambda dim: ln.nn.LayerScale(dim, 0.1),
    "LayerScale(1e-2)": lambda dim: ln.nn.LayerScale(dim, 1e-2),
    "LayerScale(1e-4)": lambda dim: ln.nn.LayerScale(dim, 1e-4),
    "LayerScale(1e-6)": lambda dim: ln.nn.LayerScale(dim, 1e-6),
    "ReZero()": lambda dim: ln.nn.ReZero(),
    "Gate(kind='tanh')": lambda dim: ln.nn.Gate(),
    "Gate(kind='sigmoid')": lambda dim: ln.nn.Gate(kind="sigmoid"),
}


def scale_rows() -> list[dict[str, Any]]:
    rows = []
    for norm in (False, True):
        for name, scale in SCALES.items():

            def run(seed: int, scale: Any = scale, norm: bool = norm) -> dict[str, float]:
                model = Residual(scale, norm)
                logits = model(TRAIN_X[:512])
                F.cross_entropy(logits, TRAIN_Y[:512]).backward()
                found = {
                    "logit_std": logits.std().item(),
                    "first_grad": model.inner[0].weight.grad.norm().item(),
                    "last_grad": model.inner[-1].weight.grad.norm().item(),
                }
                optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3, weight_decay=0.0))
                for epoch in epochs(model, optimizer, 10):
                    if epoch in (1, 10):
                        found[f"accuracy_{epoch}"] = accuracy(model)
                values = [p.abs().mean() for s in model.scales for p in s.parameters()]
                found["scale_after"] = torch.stack(values).mean().item() if values else 1.0
                return found

            rows.append({"scale": name, "norm": norm, **median(run)})
            print(rows[-1])
    return rows


# --- 4. what the initialisers give, beside torch's and in half precision ------------------------


def given_rows() -> list[dict[str, Any]]:
    torch.manual_seed(0)

    def defect(x: Tensor) -> float:
        return (x @ x.mT - torch.eye(x.shape[-1])).flatten(-2).norm(dim=-1).max().item()

    def std(x: Tensor) -> float:
        return x.double().std().item()

    bank, stack, long = (16, 64, 256), (48, 64, 64), torch.empty(200_000)
    rows = [
        {
            "case": "std of an expert bank (16, 64, 256), Kaiming for one expert",
            "wanted": (2 / 64) ** 0.5,
            "ours": std(ln.init.kaiming_normal()(torch.empty(bank), role="experts")),
            "torch": std(nn.init.kaiming_normal_(torch.empty(bank))),
        },
        {
            "case": "largest ‖WWᵀ − I‖ of a stack (48, 64, 64)",
            "wanted": 0.0,
            "ours": defect(ln.init.orthogonal()(torch.empty(stack))),
            "torch": defect(nn.init.orthogonal_(torch.empty(stack))),
        },
        {
            "case": "largest magnitude / std of trunc_normal(std=0.02), as it is by default",
            "wanted": 2.0,
            "ours": ln.init.trunc_normal(0.02)(long.clone()).abs().max().item() / 0.02,
            "torch": nn.init.trunc_normal_(long, std=0.02).abs().max().item() / 0.02,
        },
    ]
    for row in rows:
        print(row)
    return rows


SECTIONS = {"depth": depth_rows, "tokens": token_rows, "scales": scale_rows, "given": given_rows}


def main(only: list[str]) -> None:
    torch.set_num_threads(1)
    path = RESULTS / "init.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if only else {}
    for name in only or SECTIONS:
        rows[name] = SECTIONS[name]()
    print(save("init", rows, seeds=SEEDS))


if __name__ == "__main__":
    main(sys.argv[1:])
