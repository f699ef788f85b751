"""What it costs to keep parameters in a set, beside the peers, and how well they are kept.

    python benchmarks/constraints.py                     # all of it, some minutes on one core
    python benchmarks/constraints.py --only many single  # parts; the file keeps the others
    python benchmarks/constraints.py --table             # write the file into the docs pages

Peers that are not installed are left out: geotorch, geoopt, pogo-torch; constraints_training.py
says how to make an environment that has them. Times are CPU seconds of one thread; every ratio is
taken within rounds that run both tasks in turn.
"""

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from environment import Timing, paired, parts, save_part, where, write_tables
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


def versions() -> dict[str, str]:
    found = {}
    for name in ("geotorch", "geoopt", "pogo-torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


PARTS: dict[str, Callable[[Rows], None]] = {
    "many": many,
    "single": single,
    "on access": on_access,
    "vectors": vectors,
    "steady state": steady_state,
}
WORDS = {
    "en": {
        "timed": ("case", "what", "time", "ratio", "defect"),
        "steady": ("columns", "mode", "step", "worst defect"),
        "AdamW": "AdamW's step",
        "two passes": "both",
    },
    "zh": {
        "timed": ("情形", "做什么", "时间", "比值", "偏差"),
        "steady": ("列数", "方式", "步长", "最大偏差"),
        "AdamW": "AdamW 的一步",
        "two passes": "两者",
    },
}


def table(language: str) -> str:
    """The parts of the result file as Markdown; a part that was not measured is left out."""
    words, lines = WORDS[language], []
    for part in parts("constraints").values():
        rows, timed = part["rows"], "timing" in part["rows"][0]
        columns = words["timed" if timed else "steady"]
        lines += ["", bar(columns), bar(["---"] * len(columns))]
        for r in rows:
            if not timed:
                lines.append(bar([str(r["n"]), r["how"], f"{r['step']:g}", f"{r['defect']:.1e}"]))
                continue
            err = f"{r['defect']:.1e}" if r["defect"] is not None else ""
            took, ratio = r["timing"]["median"] * 1e3, r["timing"]["ratio"]
            unit = words.get(r["unit"], r["unit"])
            lines.append(
                bar([r["case"], r["name"], f"{took:.2f} ms", f"{ratio:.2f} × {unit}", err])
            )
        lines += ["", below(part, language)]
    return "\n".join([*lines[1:], ""])


def below(part: dict[str, Any], language: str) -> str:
    """The line below a table: where it was measured, and the peers."""
    peers = ", ".join(f"{name} {found}" for name, found in part["versions"].items())
    said = {"en": f" Beside {peers}.", "zh": f"对照：{peers}。"}[language]
    return where(part["environment"], language) + said


def bar(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def one_thread() -> None:
    """Start again where numpy's BLAS, which reads it when it is loaded, has more threads."""
    if os.environ.get("OMP_NUM_THREADS") != "1":
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # the peers use what torch deprecates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--table", action="store_true", help="write the docs pages")
    given = parser.parse_args()
    if given.table:
        write_tables("constraints", "constraints", table)
        return
    one_thread()
    for name in given.only:
        rows: Rows = []
        PARTS[name](rows)
        save_part("constraints", name, rows, versions=versions())


if __name__ == "__main__":
    main()
