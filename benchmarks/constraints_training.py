"""Where training ends, with each way to keep a matrix orthogonal at its best learning rates.

    python benchmarks/constraints_training.py          # about half an hour on one core
    python benchmarks/constraints_training.py CopyTask # one problem; the file keeps the other
    python benchmarks/constraints_training.py --table  # write the file into the docs pages

Every method gets the same grid of learning rates, for the orthogonal matrix and for the rest. The
FINALISTS pairs that are best on the first seed run on all SEEDS; the best median counts. Losses do
not depend on the load of the machine. The peers need an environment of their own, beside the
project's:

    python -m venv ../peers
    ../peers/bin/pip install -c constraints.txt torch numpy
    ../peers/bin/pip install geotorch==0.4.0 geoopt==0.5.1 pogo-torch==1.0.2
    PYTHONPATH=src ../peers/bin/python benchmarks/constraints_training.py

A peer that is not installed is left out.
"""

import math
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from constraints import (
    ORTHOGONAL,
    POGO,
    bar,
    below,
    defect,
    geoopt,
    geotorch,
    one_thread,
    pogo,
    versions,
)
from environment import parts, save_part, write_tables
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import learnables as ln

SEEDS, FINALISTS = 5, 3


class Problem:
    """A model with one orthogonal matrix, and a loss."""

    model: nn.Module
    steps: int
    rates: tuple[float, ...]
    scales: tuple[float, ...]  # of the orthogonal matrix, relative to the rest

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def loss(self) -> Tensor:
        raise NotImplementedError


class Procrustes(Problem):
    """min ‖A X − B‖² over orthogonal X, which is known to reach 0."""

    steps = 300
    rates = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    scales = (1.0,)

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        n, g = 64, self.generator
        self.a = torch.randn(200, n, generator=g) / math.sqrt(200)
        start = ORTHOGONAL.project(torch.randn(n, n, generator=g))
        k = torch.randn(n, n, generator=g)
        k = (k - k.T) / math.sqrt(n)
        self.b = self.a @ start @ torch.matrix_exp(0.7 * k)
        self.model = nn.Module()
        self.model.w = nn.Parameter(start)

    def loss(self) -> Tensor:
        return (self.a @ self.model.w - self.b).square().sum()


class Recurrent(nn.Module):
    """A recurrent network whose hidden matrix ``w`` is orthogonal."""

    def __init__(self, letters: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.w = nn.Parameter(ORTHOGONAL.project(torch.randn(hidden, hidden, generator=generator)))
        self.read = nn.Parameter(torch.randn(letters, hidden, generator=generator) * 0.1)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.write = nn.Parameter(torch.randn(hidden, letters, generator=generator) * 0.1)

    def forward(self, x_BT: Tensor) -> Tensor:
        w = self.w
        h = x_BT.new_zeros(x_BT.shape[0], w.shape[0], dtype=torch.float32)
        out = []
        for x in x_BT.unbind(1):
            z = h @ w + self.read[x]
            h = z.sign() * torch.relu(z.abs() + self.bias)  # modReLU
            out.append(h @ self.write)
        return torch.stack(out, 1)


class CopyTask(Problem):
    """Five letters, a pause of ten, then write the letters: needs a memory without decay."""

    steps = 250
    rates = (0.01, 0.03, 0.1)
    scales = (0.1, 1.0, 10.0)

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.model = Recurrent(8, 48, self.generator)

    def loss(self) -> Tensor:
        letters = torch.randint(1, 7, (32, 5), generator=self.generator)
        pause = torch.zeros(32, 10, dtype=torch.int64)
        go = torch.full((32, 1), 7)
        x = torch.cat([letters, pause, go, torch.zeros(32, 4, dtype=torch.int64)], 1)
        guess = self.model(x)[:, -5:]
        return nn.functional.cross_entropy(guess.flatten(0, 1), letters.flatten())


Step = Callable[[], None]
Start = Callable[[Problem, float, float], Step]


def adam(problem: Problem, lr: float, scale: float) -> torch.optim.Adam:
    """Adam with ``lr · scale`` for the orthogonal matrix."""
    parametrized = getattr(problem.model, "parametrizations", None)
    mine = list((parametrized.w if parametrized is not None else problem.model).parameters())
    mine = mine if parametrized is not None else [problem.model.w]
    rest = [p for p in problem.model.parameters() if not any(p is q for q in mine)]
    groups = [{"params": mine, "lr": lr * scale}, {"params": rest, "lr": lr}]
    return torch.optim.Adam([group for group in groups if group["params"]])


def ours(how: str, momentum: bool = False) -> Start:
    def start(problem: Problem, lr: float, scale: float) -> Step:
        optimizer = adam(problem, lr, scale)
        ln.constrain(
            problem.model, "w", ORTHOGONAL, how=how, optimizer=optimizer, momentum=momentum
        )
        return optimizer.step

    return start


def on_access_start(problem: Problem, lr: float, scale: float) -> Step:
    ln.constrain(problem.model, "w", ORTHOGONAL, how="parametrize")
    return adam(problem, lr, scale).step


def torch_start(kind: str) -> Start:
    def start(problem: Problem, lr: float, scale: float) -> Step:
        orthogonal(problem.model, "w", kind)
        return adam(problem, lr, scale).step

    return start


def geotorch_start(problem: Problem, lr: float, scale: float) -> Step:
    value = problem.model.w.detach().clone()
    geotorch.orthogonal(problem.model, "w")
    problem.model.w = value
    return adam(problem, lr, scale).step


def geoopt_start(problem: Problem, lr: float, scale: float) -> Step:
    value = problem.model.w.detach().clone()
    w = problem.model.w = geoopt.ManifoldParameter(value, manifold=geoopt.EuclideanStiefel())
    rest = [p for p in problem.model.parameters() if p is not w]
    groups = [{"params": [w], "lr": lr * scale}, {"params": rest, "lr": lr}]
    return geoopt.optim.RiemannianAdam([g for g in groups if g["params"]], lr=lr).step


def pogo_start(problem: Problem, lr: float, scale: float) -> Step:
    w = problem.model.w
    others = [p for p in problem.model.parameters() if p is not w]
    theirs = POGO([w], pogo.VectorAdam(), lr=lr * scale, flatten_fn=lambda x: x[None])
    rest = torch.optim.Adam(others, lr=lr) if others else None

    def step() -> None:
        theirs.step()
        if rest is not None:
            rest.step()

    return step


METHODS: dict[str, Start] = {
    "learnables, project": ours("project"),
    "learnables, tangent": ours("tangent"),
    "learnables, tangent + momentum": ours("tangent", momentum=True),
    "learnables, parametrize": on_access_start,
    "torch cayley": torch_start("cayley"),
    "torch matrix_exp": torch_start("matrix_exp"),
}
if POGO is not None:
    METHODS |= {
        "geotorch": geotorch_start,
        "geoopt RiemannianAdam": geoopt_start,
        "POGO(VectorAdam)": pogo_start,
    }


def measured(problem: type[Problem], name: str) -> dict[str, Any]:
    """The final losses at a method's best rates."""

    def loss(seed: int, lr: float, scale: float) -> tuple[float, float]:
        torch.manual_seed(seed)
        return train(problem(seed), METHODS[name], lr, scale)

    grid = {(lr, scale): loss(0, lr, scale) for lr in problem.rates for scale in problem.scales}
    finals = {
        rates: [grid[rates], *(loss(seed, *rates) for seed in range(1, SEEDS))]
        for rates in sorted(grid, key=lambda rates: grid[rates][0])[:FINALISTS]
    }

    def median(rates: tuple[float, float]) -> float:
        return statistics.median(run[0] for run in finals[rates])

    lr, scale = min(finals, key=median)
    runs = finals[lr, scale]
    losses = sorted(run[0] for run in runs)
    return {
        "case": problem.__name__,
        "name": name,
        "rate": lr,
        "rate of the matrix": lr * scale,
        "losses": losses,
        "defect": max(run[1] for run in runs),
        "grid": {f"{a:g}, {a * b:g}": found[0] for (a, b), found in grid.items()},
    }


def train(problem: Problem, start: Start, lr: float, scale: float) -> tuple[float, float]:
    """The mean loss of the last ten steps, and how far the matrix is from orthogonal then."""
    step, losses = start(problem, lr, scale), []
    for _ in range(problem.steps):
        for p in problem.model.parameters():
            p.grad = None
        loss = problem.loss()
        loss.backward()
        step()
        losses.append(float(loss.detach()))
    last = sum(losses[-10:]) / 10
    return (last if math.isfinite(last) else math.inf), defect([problem.model.w])


WORDS = {
    "en": ("problem", "method", "final loss", "of seeds", "from", "to", "rate", "of the matrix"),
    "zh": ("问题", "方法", "最终损失", "种子数", "最低", "最高", "学习率", "矩阵的学习率"),
}


def table(language: str) -> str:
    """The result file as Markdown."""
    lines = []
    for part in parts("constraints_training").values():
        lines += ["", bar(WORDS[language]), bar(["---"] * len(WORDS[language]))]
        for r in part["rows"]:
            found = (statistics.median(r["losses"]), min(r["losses"]), max(r["losses"]))
            loss, *ends = (f"{x:.1e}" for x in found)
            rates = f"{r['rate']:g}", f"{r['rate of the matrix']:g}"
            lines.append(bar([r["case"], r["name"], loss, str(len(r["losses"])), *ends, *rates]))
        lines += ["", below(part, language)]
    return "\n".join([*lines[1:], ""])


def main() -> None:
    if "--table" in sys.argv:
        write_tables("constraints", "constraints_training", table)
        return
    one_thread()
    problems = {problem.__name__: problem for problem in (Procrustes, CopyTask)}
    for problem in [problems[name] for name in sys.argv[1:]] or problems.values():
        rows = []
        for name in METHODS:
            rows.append(measured(problem, name))
            print({k: v for k, v in rows[-1].items() if k != "grid"}, flush=True)
        save_part("constraints_training", problem.__name__, rows, versions=versions())


if __name__ == "__main__":
    main()
