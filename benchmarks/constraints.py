"""What it costs to keep parameters in a set, and what it does to training, beside the peers.

    python benchmarks/constraints.py            # all of it, some minutes on one core
    python benchmarks/constraints.py --speed    # results/constraints.json only
    python benchmarks/constraints.py --training # results/constraints_training.json only
    python benchmarks/constraints.py --table    # write what the files say into the docs page

Peers that are not installed are left out: geotorch, geoopt, pogo-torch. Times are CPU seconds of
one thread; every ratio is taken within rounds that run both tasks in turn.
"""

import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from environment import RESULTS, Timing, paired, save
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import learnables as ln
from learnables.sets.apply import Enforcer
from learnables.sets.batch import Kept
from learnables.sets.constraint import Constraint

try:
    import geoopt
    import geotorch
    from pogo import POGO
    from pogo import base as pogo
except ImportError as error:
    print(f"{error.name} is not installed: its rows are left out")
    geoopt = geotorch = POGO = pogo = None

BEGIN, END = "<!-- benchmarks/constraints.py --table -->", "<!-- end of the table -->"
Rows = list[dict[str, Any]]
ORTHOGONAL = ln.sets.Orthogonal()


def random_orthogonal(*shape: int) -> Tensor:
    return ORTHOGONAL.project(torch.randn(*shape, dtype=torch.float64)).float()


def random_step(*shape: int, size: float = 1e-2) -> Tensor:
    """A step of spectral norm ``size``, what a projection sees after an optimizer's step."""
    step = torch.randn(*shape)
    return size * step / torch.linalg.matrix_norm(step, 2)[..., None, None]


def defect(params: list[Tensor]) -> float:
    return max(float(ORTHOGONAL.violation(p.detach().double()).max()) for p in params)


def row(rows: Rows, case: str, name: str, timing: Timing, unit: str, err: float | None) -> None:
    rows.append({"case": case, "name": name, "unit": unit, "defect": err, "timing": timing})
    shown = f"  defect {err:.1e}" if err is not None else ""
    print(
        f"{case:14} {name:42} {timing.median * 1e3:9.3f} ms  {timing.ratio:8.2f} x {unit}"
        f"  (best {timing.best_ratio:.2f}){shown}",
        flush=True,
    )


@torch.no_grad()
def the_articles_loop(params: list[nn.Parameter]) -> None:
    for p in params:
        u, _, vh = torch.linalg.svd(p)
        p.copy_(u @ vh)


def many(rows: Rows) -> None:
    """48 separate 64 × 64 parameters, moved by one step; stacking and copying included."""
    params = [nn.Parameter(random_orthogonal(64, 64)) for _ in range(48)]
    moved = [p.detach() + random_step(64, 64) for p in params]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    for p in copies:
        p.grad = torch.randn(64, 64)
    adamw = torch.optim.AdamW(copies, lr=1e-3, foreach=True)

    @torch.no_grad()
    def put_back() -> None:
        torch._foreach_copy_(params, moved)

    enforcer = Enforcer(Kept(f"w{i}", p, Constraint(ORTHOGONAL)) for i, p in enumerate(params))
    layers = [nn.Linear(64, 64, bias=False) for _ in range(48)]
    for layer in layers:
        orthogonal(layer)
    gradients = [torch.randn(64, 64) for _ in range(48)]

    def torch_parametrization() -> None:
        for layer, g in zip(layers, gradients, strict=True):
            layer.weight.backward(g)

    tasks: dict[str, Callable[[], object]] = {
        "learnables, project": enforcer.project_,
        "the article's SVD loop": lambda: the_articles_loop(params),
        "torch parametrizations.orthogonal fwd+bwd": torch_parametrization,
    }
    if POGO is not None:
        theirs = [nn.Parameter(random_orthogonal(1, 64, 64)) for _ in range(48)]
        for p in theirs:
            p.grad = random_step(1, 64, 64, size=1.0)
        tasks["POGO(VectorAdam), whole step"] = POGO(theirs, pogo.VectorAdam(), lr=1e-2).step
        riemann = [
            geoopt.ManifoldParameter(random_orthogonal(64, 64), manifold=geoopt.EuclideanStiefel())
            for _ in range(48)
        ]
        for p in riemann:
            p.grad = torch.randn(64, 64)
        tasks["geoopt RiemannianAdam, whole step"] = geoopt.optim.RiemannianAdam(
            riemann, lr=1e-3
        ).step
    timings = paired(adamw.step, tasks, rounds=21, prepare=put_back)
    put_back()
    enforcer.project_()
    for name, timing in timings.items():
        err = defect(params) if name == "learnables, project" else None
        name = "AdamW(foreach=True), whole step" if name == "baseline" else name
        row(rows, "48 × 64²", name, timing, "AdamW", err)


def single(rows: Rows) -> None:
    """One 512 × 512 parameter."""
    w = nn.Parameter(random_orthogonal(512, 512))
    moved = w.detach() + random_step(512, 512)
    a, out = torch.randn(512, 512), torch.empty(512, 512)

    @torch.no_grad()
    def put_back() -> None:
        w.copy_(moved)

    enforcer = Enforcer([Kept("w", w, Constraint(ORTHOGONAL))])
    layers = {m: nn.Linear(512, 512, bias=False) for m in ("matrix_exp", "cayley")}
    for kind, layer in layers.items():
        orthogonal(layer, orthogonal_map=kind)
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(torch.randn_like(p).tril(-1), alpha=1e-2 / math.sqrt(512))
    g = torch.randn(512, 512)
    tasks: dict[str, Callable[[], object]] = {
        "learnables, project": enforcer.project_,
        "the article's SVD": lambda: the_articles_loop([w]),
        "torch matrix_exp fwd+bwd": lambda: layers["matrix_exp"].weight.backward(g),
        "torch cayley fwd+bwd": lambda: layers["cayley"].weight.backward(g),
    }
    if POGO is not None:
        theirs = nn.Parameter(random_orthogonal(1, 512, 512))
        theirs.grad = random_step(1, 512, 512, size=1.0)
        tasks["POGO(VectorAdam), whole step"] = POGO([theirs], pogo.VectorAdam(), lr=1e-2).step
    timings = paired(lambda: torch.mm(a, a, out=out), tasks, rounds=15, prepare=put_back)
    put_back()
    enforcer.project_()
    for name, timing in timings.items():
        err = defect([w]) if name == "learnables, project" else None
        row(rows, "512²", "one GEMM" if name == "baseline" else name, timing, "GEMM", err)


def on_access(rows: Rows) -> None:
    """Forward and backward of a 512 × 512 weight that a tangent step has moved."""
    ours = nn.Linear(512, 512, bias=False)
    ln.constrain(ours, "weight", ORTHOGONAL, how="parametrize")
    original = ours.parametrizations.weight.original
    with torch.no_grad():
        moved = original - ORTHOGONAL.tangent(original, random_step(512, 512))
    a, out, g = torch.randn(512, 512), torch.empty(512, 512), torch.randn(512, 512)

    @torch.no_grad()
    def put_back() -> None:
        original.copy_(moved)
        original.grad = None

    timings = paired(
        lambda: torch.mm(a, a, out=out),
        {"learnables, parametrize fwd+bwd": lambda: ours.weight.backward(g)},
        rounds=21,
        prepare=put_back,
    )
    for name, timing in timings.items():
        err = defect([ours.weight]) if name != "baseline" else None
        row(rows, "512² access", "one GEMM" if name == "baseline" else name, timing, "GEMM", err)


def vectors(rows: Rows) -> None:
    """Rows of 48 × (64 × 64), and the simplex on 1024 × 512."""
    params = [nn.Parameter(torch.randn(64, 64)) for _ in range(48)]
    plain = [p.detach().clone() for p in params]
    values = [p.detach().clone() for p in params]

    @torch.no_grad()
    def put_back() -> None:
        torch._foreach_copy_(params, values)

    def norm_and_scale() -> None:
        torch._foreach_norm(plain)
        torch._foreach_mul_(plain, 1.0)

    tasks = {}
    for of in (ln.sets.Sphere(), ln.sets.Ball()):
        kept = [Kept(f"w{i}", p, Constraint(of)) for i, p in enumerate(params)]
        tasks[f"learnables, {type(of).__name__} of rows"] = Enforcer(kept).project_
    for name, timing in paired(norm_and_scale, tasks, rounds=41, prepare=put_back).items():
        name = "_foreach_norm + _foreach_mul_" if name == "baseline" else name
        row(rows, "rows", name, timing, "two passes", None)

    x = torch.randn(1024, 512)

    def by_sorting() -> Tensor:
        u = x.sort(dim=-1, descending=True).values
        excess = u.cumsum(-1) - 1
        rank = torch.arange(1, 513)
        count = (u * rank > excess).sum(-1, keepdim=True)
        return (x - excess.gather(-1, count - 1) / count).clamp_min(0)

    simplex = ln.sets.Simplex()
    torch.testing.assert_close(simplex.project(x), by_sorting(), atol=1e-5, rtol=0)
    tasks = {"learnables, Simplex": lambda: simplex.enforce(x)}
    for name, timing in paired(by_sorting, tasks, rounds=15).items():
        name = "by sorting" if name == "baseline" else name
        row(rows, "1024 × 512", name, timing, "sort", None)


def steady_state(rows: Rows) -> None:
    """The worst defect over 200 random steps, of the default and with tangent gradients."""
    for n in (64, 512):
        for how in ("project", "tangent"):
            for size in (1e-3, 1e-2, 5e-2):
                torch.manual_seed(1)
                w, worst = random_orthogonal(n, n), 0.0
                for _ in range(200 if n == 64 else 40):
                    step = random_step(n, n, size=size)
                    step = ORTHOGONAL.tangent(w, step) if how == "tangent" else step
                    w, _ = ORTHOGONAL.enforce(w - step)
                    worst = max(worst, defect([w]))
                rows.append({"case": "steady", "n": n, "how": how, "step": size, "defect": worst})
                print(f"steady state   n={n} {how:8} steps of {size:g}: defect {worst:.1e}")


class Problem:
    """A model with one orthogonal matrix, and a loss."""

    model: nn.Module
    steps: int
    rates: tuple[float, ...]
    scales: tuple[float, ...]  # of the orthogonal matrix, relative to the rest

    def loss(self) -> Tensor:
        raise NotImplementedError


class Procrustes(Problem):
    """min ‖A X − B‖² over orthogonal X, which is known to reach 0."""

    steps = 300
    rates = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    scales = (1.0,)

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        n = 64
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
    rates = (0.003, 0.01, 0.03)
    scales = (0.1, 1.0, 10.0)

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
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


def training(rows: Rows) -> None:
    """The final loss at each method's best rates: the mean of the last ten steps."""
    for make in (Procrustes, CopyTask):
        for name, start in METHODS.items():
            results = {
                (lr, scale): train(make(), start, lr, scale)
                for lr in make.rates
                for scale in make.scales
            }
            (lr, scale), (loss, err) = min(results.items(), key=lambda item: item[1][0])
            rows.append(
                {
                    "case": make.__name__,
                    "name": name,
                    "rate": lr,
                    "rate of the matrix": lr * scale,
                    "loss": loss,
                    "defect": err,
                    "all": {f"{a:g}, {a * b:g}": found[0] for (a, b), found in results.items()},
                }
            )
            print(
                f"{make.__name__:14} {name:34} loss {loss:.2e} at {lr:g} (matrix {lr * scale:g}), "
                f"defect {err:.1e}",
                flush=True,
            )


def train(problem: Problem, start: Start, lr: float, scale: float) -> tuple[float, float]:
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


def versions() -> dict[str, str]:
    found = {}
    for name in ("geotorch", "geoopt", "pogo-torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table() -> str:
    """The two result files as Markdown, with the environment that each was measured in."""
    lines = []
    for name in ("constraints", "constraints_training"):
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        at, peers = found["environment"], found["versions"]
        lines += [
            "",
            f"{at['cpu']}, {at['threads']} thread, "
            f"load {at['load_1min']:.1f} on {at['cores']} cores, "
            f"torch {at['torch']}, {', '.join(f'{k} {v}' for k, v in peers.items())}, "
            f"{at['date'][:10]}:",
            "",
        ]
        timed = [r for r in found["rows"] if "timing" in r]
        steady = [r for r in found["rows"] if r["case"] == "steady"]
        trained = [r for r in found["rows"] if "loss" in r]
        if timed:
            lines += ["| case | what | time | ratio | defect |", "|---|---|---|---|---|"]
        for r in timed:
            err = f"{r['defect']:.1e}" if r["defect"] is not None else ""
            took, ratio = r["timing"]["median"] * 1e3, r["timing"]["ratio"]
            lines.append(
                f"| {r['case']} | {r['name']} | {took:.2f} ms | {ratio:.2f} × {r['unit']} | {err} |"
            )
        if steady:
            lines += ["", "| columns | mode | step | worst defect |", "|---|---|---|---|"]
        for r in steady:
            lines.append(f"| {r['n']} | {r['how']} | {r['step']:g} | {r['defect']:.1e} |")
        if trained:
            lines += [
                "| problem | method | final loss | rate | of the matrix |",
                "|---|---|---|---|---|",
            ]
        for r in trained:
            lines.append(
                f"| {r['case']} | {r['name']} | {r['loss']:.2e} | {r['rate']:g} | "
                f"{r['rate of the matrix']:g} |"
            )
    return "\n".join(lines[1:])


def write_table() -> None:
    page = Path(__file__).parents[1] / "docs" / "en" / "constraints.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
    print(page)


def main() -> None:
    if "--table" in sys.argv:
        write_table()
        return
    if os.environ.get("OMP_NUM_THREADS") != "1":  # numpy's BLAS reads it when it is loaded
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # the peers use what torch deprecates
    speed: Rows = []
    trained: Rows = []
    if "--training" not in sys.argv:
        for measure in (many, single, on_access, vectors, steady_state):
            measure(speed)
    if "--speed" not in sys.argv:
        training(trained)
    for name, rows in (("constraints", speed), ("constraints_training", trained)):
        if rows:
            print(save(name, rows, versions=versions()))


if __name__ == "__main__":
    main()
