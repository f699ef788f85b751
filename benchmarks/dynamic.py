"""What a weight of its own for each sample costs, by every exact form and beside the peers.

    python benchmarks/dynamic.py                # all parts, about eight minutes on one core
    python benchmarks/dynamic.py --only kinds   # one part, three minutes at most; the others stay
    python benchmarks/dynamic.py --quick        # a dry run of fewer shapes, which writes nothing
    python benchmarks/dynamic.py --fit          # the coefficients of learnables/dynamic/cost.py
    python benchmarks/dynamic.py --table        # write what the file says into the docs pages

One thread, process CPU time, forward and backward, tasks in turns with their baseline. Writes
results/dynamic.json, each part with the machine it was measured on.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from environment import bar, paired, parts, save_part, where, write_tables
from torch import Tensor, nn

import learnables as ln
from learnables.dynamic import FORMS, mix, quickest
from learnables.dynamic.cost import work

Rows = list[dict[str, Any]]
Shape = tuple[int, int, int, int, int]
FULL = [(64, 256), (256, 16), (256, 256)]  # d, B
UNSEEN = [50, 1128]  # how many shapes, and their seed


def training(task: Callable[[], Tensor], g: Tensor, leaves: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        task().backward(g)

    return run


def kept(task: Callable[[], Tensor], own: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, beside parameters and inputs in ``own``."""
    skipped = {t.untyped_storage().data_ptr() for t in own}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in skipped:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        task()
    return sum(found.values())


def kinds() -> Rows:
    """Mixtures of 8 bases and rank 8 at 256 x 256, beside building every weight, and the flop.

    Every weight is built in two ways: from the same 8 bases or factors, as CondConv does, and by a
    whole hyper-network, as the article's 4.1 does.
    """
    return [one_kind(kind) for kind in ("basis", "low_rank")]


def one_kind(kind: str) -> dict[str, Any]:
    I, C, H, B = 256, 128, 256, 256  # noqa: E741
    torch.manual_seed(0)
    layer = ln.nn.DynamicLinear(I, I, C, kind=kind, hidden_features=H, bias=False)
    x, condition = torch.randn(B, I, requires_grad=True), torch.randn(B, C)
    g, leaves = torch.randn(B, I), [x, *layer.parameters()]

    def ours() -> Tensor:
        return layer(x, condition)

    def built() -> Tensor:
        """Every sample's weight, then one batched product: CondConv's way."""
        h = nn.functional.linear(condition, layer.hidden_weight, layer.hidden_bias).relu()
        if kind == "basis":
            gates = nn.functional.linear(h, layer.gate_weight, layer.gate_bias).softmax(-1)
            weight = (gates @ layer.basis_weight.flatten(1)).view(B, I, I)
        else:
            left = (h @ layer.left_weight.flatten(1)).view(B, -1, I)
            right = (h @ layer.right_weight.flatten(1)).view(B, I, -1)
            weight = right @ left
        return torch.bmm(x[:, None], weight + layer.weight.t()).squeeze(1)

    hyper, base, their_leaves = article(I, H, C)
    their_leaves = [x, *their_leaves]

    def the_article() -> Tensor:
        return torch.bmm(x[:, None], base + hyper(condition).view(-1, I, I)).squeeze(1)

    torch.testing.assert_close(built(), ours(), rtol=1e-4, atol=1e-4)
    flop = multiplications(kind, B, I, H, C)
    dense = nn.Linear(I, I, bias=False)  # a dense product of as many multiplications
    wide = torch.randn(flop // (I * I), I, requires_grad=True)
    timings = paired(
        training(lambda: dense(wide), torch.randn(len(wide), I), [wide, dense.weight]),
        {
            "ours": training(ours, g, leaves),
            "built": training(built, g, leaves),
            "article": training(the_article, g, their_leaves),
        },
        rounds=9,
        seconds=12,
    )
    row = {
        "kind": kind,
        "faster_than_built": timings["built"].median / timings["ours"].median,
        "faster_than_article": timings["article"].median / timings["ours"].median,
        "x_dense_product_of_its_flop": timings["ours"].ratio,
        "ms": 1e3 * timings["ours"].median,
        "kept_MB": kept(ours, [*leaves, condition]) / 1e6,
        "built_kept_MB": kept(built, [*leaves, condition]) / 1e6,
        "article_kept_MB": kept(the_article, [*their_leaves, condition]) / 1e6,
    }
    show(row)
    return row


def article(d: int, H: int, C: int) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """The generator and the base of the article's 4.1, for d x d; and both as leaves."""
    generator = nn.Sequential(nn.Linear(C, H), nn.ReLU(), nn.Linear(H, d * d, bias=False))
    base = nn.Parameter(torch.randn(d, d) / d**0.5)
    return generator, base, [base, *generator.parameters()]


def multiplications(kind: str, B: int, I: int, H: int, C: int) -> int:  # noqa: E741
    K = r = 8
    shared = B * (C * H + I * I)
    if kind == "basis":
        return shared + B * (H * K + K * I * I)
    return shared + 2 * B * H * I * r + 2 * B * I * r


def full() -> Rows:
    """The hyper-network itself, beside the corrected code of the article."""
    return [one_full(d, B) for d, B in FULL]


def one_full(d: int, B: int) -> dict[str, Any]:
    C, H = 128, 256
    torch.manual_seed(0)
    layer = ln.nn.DynamicLinear(d, d, C, kind="full", hidden_features=H, bias=False)
    x, condition = torch.randn(B, d, requires_grad=True), torch.randn(B, C)
    g = torch.randn(B, d)
    generator, base, their_leaves = article(d, H, C)
    leaves, their_leaves = [x, *layer.parameters()], [x, *their_leaves]

    def built() -> Tensor:
        return torch.bmm(x[:, None], base + generator(condition).view(-1, d, d)).squeeze(1)

    def ours() -> Tensor:
        return layer(x, condition)

    timings = paired(
        training(built, g, their_leaves),
        {"full": training(ours, g, leaves)},
        rounds=9,
        seconds=8 if d * B < 256 * 256 else 16,
    )
    kept_by_us = kept(ours, [*leaves, condition])
    kept_by_them = kept(built, [*their_leaves, condition])
    row = {
        "d": d,
        "B": B,
        "x_time_of_built": timings["full"].ratio,
        "kept_MB": kept_by_us / 1e6,
        "built_kept_MB": kept_by_them / 1e6,
        "less_kept": kept_by_them / kept_by_us,
        "ms": 1e3 * timings["full"].median,
    }
    show(row)
    return row


GRID: list[Shape] = [
    (B, T, d, d, K)
    for d in (64, 256)
    for B, T in ((16, 1), (256, 1), (16, 16), (8, 128))
    for K in (4, 16, 64)
]


def forms() -> Rows:
    """24 shapes: what the cost model chose, beside the best of the three exact forms."""
    return choices(GRID)


def unseen() -> Rows:
    """50 shapes drawn at random that its coefficients were not fitted to."""
    return choices(drawn_shapes(*UNSEEN))


def choices(shapes: list[Shape]) -> Rows:
    rows = []
    for shape in shapes:
        B, T, I, O, K = shape  # noqa: E741
        found, chosen = seconds_of(shape), quickest(FORMS, *shape)
        best = min(found, key=found.__getitem__)
        row: dict[str, Any] = {"B": B, "T": T, "I": I, "O": O, "K": K, "chosen": chosen}
        row |= {"best": best, "chosen_over_best": found[chosen] / found[best]}
        row |= {f"{form}_ms": 1e3 * found[form] for form in FORMS}
        show(row)
        rows.append(row)
    within = sum(row["chosen_over_best"] <= 1.1 for row in rows)
    print(f"within 10 % of the best: {within} of {len(rows)}")
    return rows


def seconds_of(shape: Shape, seconds: float = 1.5) -> dict[str, float]:
    """Seconds of each form, the quickest of many rounds in which all take turns."""
    B, T, I, O, K = shape  # noqa: E741
    torch.manual_seed(0)
    h, bank = torch.randn(B, K, requires_grad=True), torch.randn(K, I, O, requires_grad=True)
    x, g = torch.randn(B, T, I, requires_grad=True), torch.randn(B, T, O)
    tasks = {
        form: training(lambda form=form: mix(h, bank, x, form=form), g, [h, bank, x])
        for form in FORMS
    }
    found: dict[str, list[float]] = {form: [] for form in FORMS}
    end = time.perf_counter() + seconds
    for count in range(60):
        for form, task in tasks.items():
            begun = time.process_time()
            task()
            if count:
                found[form].append(time.process_time() - begun)
        if count >= 3 and time.perf_counter() > end:
            break
    return {form: min(times) for form, times in found.items()}


def drawn_shapes(number: int, seed: int) -> list[Shape]:
    """Sizes that are even on a logarithmic scale, of at most a few seconds' work."""
    chance = random.Random(seed)

    def size(low: int, high: int) -> int:
        return round(math.exp(chance.uniform(math.log(low), math.log(high))))

    shapes: list[Shape] = []
    while len(shapes) < number:
        T = chance.choice([1, 1, 1, size(2, 256)])
        B, I, O, K = size(1, 1024), size(8, 768), size(8, 768), size(2, 256)  # noqa: E741
        arithmetic = B * I * O * (K + T)
        if 1e4 < arithmetic < 1.5e9 and B * T * K * I * O < 6e9 and B * I * O < 4e7:
            shapes.append((B, T, I, O, K))
    return shapes


def fit() -> None:
    """Print coefficients for each form: least squares of relative errors, none of them negative."""
    import numpy as np
    from scipy.optimize import nnls

    shapes = GRID + drawn_shapes(90, seed=0)
    found = [seconds_of(shape) for shape in shapes]
    for form in FORMS:
        amounts = [work(form, *shape) for shape in shapes]
        names = list(amounts[0])
        matrix = np.array([[amount[name] for name in names] for amount in amounts])
        wanted = np.array([1e9 * times[form] for times in found])
        weight = 1 / wanted
        for _ in range(30):  # toward errors that count alike up and down
            cost, _ = nnls(matrix * weight[:, None], wanted * weight)
            weight = 1 / np.sqrt(wanted * np.maximum(matrix @ cost, wanted / 10))
        spread = statistics.stdev(np.log(matrix @ cost / wanted))
        print(
            form, {n: float(f"{c:.2g}") for n, c in zip(names, cost, strict=True)}, f"±{spread:.0%}"
        )


def show(row: dict[str, Any]) -> None:
    parts = [f"{n} {v:.3g}" if isinstance(v, float) else f"{n} {v}" for n, v in row.items()]
    print(" | ".join(parts), flush=True)


PARTS = {f.__name__: f for f in (kinds, full, forms, unseen)}

WORDS = {
    "en": {
        "kinds": "256 × 256, 256 samples, hidden width 256, forward and backward. *Built*: the "
        "weight of every sample written from the same bases or factors, as CondConv does. *The "
        "article's*: written by a whole hyper-network, as its 4.1 does. *Its arithmetic*: one "
        "dense product of as many multiplications, which says what could be gained at most. "
        "*Kept*: by autograd, beside parameters and inputs.",
        "full": '`"full"`, the exact hyper-network, beside the article\'s 4.1 with its product '
        "corrected:",
        "forms": 'What `"auto"` chooses, beside the quickest of the exact forms, measured:',
        "kind": "kind",
        "time": "time",
        "built": "faster than built",
        "most": "at most, by its arithmetic",
        "article": "faster than the article's",
        "flop": "× the time of its arithmetic",
        "kept": "kept",
        "kept built": "kept, built",
        "size": "d, B",
        "over": "time over the article's",
        "less": "less kept",
        "shapes": "shapes",
        "within": "within 10 % of the best",
        "worst": "worst",
        "grid": "the grid",
        "unseen": "drawn at random, not fitted to",
    },
    "zh": {
        "kinds": "256 × 256，256 个样本，隐藏宽度 256，前向加反向。"
        "*先建*：像 CondConv 那样，由同样的基或因子写出每个样本的权重。"
        "*文章的*：像 4.1 那样，由整个超网络写出。*其算术量*：乘法次数相同的一个稠密乘积，"
        "由它可知至多能快多少。"
        "*保留*：除参数和输入之外，autograd 保留的量。",
        "full": '`"full"`，即精确的超网络，与乘积改正后的文章 4.1 相比：',
        "forms": '`"auto"` 的选择，与实测最快的精确形式相比：',
        "kind": "种类",
        "time": "时间",
        "built": "比先建快",
        "most": "按其算术量至多",
        "article": "比文章的快",
        "flop": "与其算术量的时间之比",
        "kept": "保留",
        "kept built": "保留（先建）",
        "size": "d，B",
        "over": "与文章的时间之比",
        "less": "保留少多少",
        "shapes": "形状",
        "within": "与最快相差不到 10 %",
        "worst": "最差",
        "grid": "网格",
        "unseen": "随机抽取，未用于拟合",
    },
}


def table(language: str) -> str:
    """The parts of the result file as Markdown; a part that was not measured is left out."""
    found, word = parts("dynamic"), WORDS[language]
    lines: list[str] = []

    def add(name: str, columns: list[str], cells: list[list[str]]) -> None:
        lines.extend([word[name], "", bar([word[c] for c in columns]), bar(["---"] * len(columns))])
        lines.extend(map(bar, cells))
        lines.extend(["", where(found[name]["environment"], language), ""])

    if "kinds" in found:
        columns = ["kind", "time", "built", "most", "article", "flop", "kept", "kept built"]
        add(
            "kinds",
            columns,
            [
                [
                    f'`"{row["kind"]}"`',
                    f"{row['ms']:.1f} ms",
                    f"{row['faster_than_built']:.1f} ×",
                    f"{row['faster_than_built'] * row['x_dense_product_of_its_flop']:.1f} ×",
                    f"{row['faster_than_article']:.1f} ×",
                    f"{row['x_dense_product_of_its_flop']:.2f}",
                    f"{row['kept_MB']:.2f} MB",
                    f"{row['built_kept_MB']:.1f} MB",
                ]
                for row in found["kinds"]["rows"]
            ],
        )
    if "full" in found:
        columns = ["size", "time", "over", "kept", "kept built", "less"]
        add(
            "full",
            columns,
            [
                [
                    f"{row['d']}, {row['B']}",
                    f"{row['ms']:.1f} ms",
                    f"{row['x_time_of_built']:.2f}",
                    f"{row['kept_MB']:.3f} MB",
                    f"{row['built_kept_MB']:.1f} MB",
                    f"{row['less_kept']:.0f} ×",
                ]
                for row in found["full"]["rows"]
            ],
        )
    chosen = {name: found[name]["rows"] for name in ("forms", "unseen") if name in found}
    if "forms" in chosen:
        titles = {"forms": word["grid"], "unseen": word["unseen"]}
        ratios = {name: [r["chosen_over_best"] for r in rows] for name, rows in chosen.items()}
        add(
            "forms",
            ["shapes", "within", "worst"],
            [
                [titles[name], f"{sum(r <= 1.1 for r in of)} / {len(of)}", f"{max(of):.2f} ×"]
                for name, of in ratios.items()
            ],
        )
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="fewer shapes; writes nothing")
    parser.add_argument("--fit", action="store_true", help="print coefficients and end")
    parser.add_argument("--table", action="store_true", help="write the docs pages")
    given = parser.parse_args()
    if given.table:
        write_tables("dynamic", "dynamic", table)
        return
    torch.set_num_threads(1)
    if given.fit:
        fit()
        return
    if given.quick:
        del GRID[8:], FULL[2:]
        UNSEEN[0] = 4
    for name in given.only:
        print(f"\n{name}")
        rows = PARTS[name]()
        if not given.quick:
            save_part("dynamic", name, rows)


if __name__ == "__main__":
    main()
