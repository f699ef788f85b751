"""What a weight of its own for each sample costs, by every exact form and beside the peers.

python benchmarks/dynamic.py [--quick] [--only PART]

One thread, process CPU time, forward and backward, tasks in turns with their baseline. Prints the
tables and writes results/dynamic.json. ``--only`` runs one of: kinds, full, forms.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from environment import paired, save
from torch import Tensor, nn

import learnables as ln
from learnables.dynamic import FORMS, mix, quickest

QUICK = "--quick" in sys.argv


def training(task: Callable[[], Tensor], g: Tensor, leaves: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        task().backward(g)

    return run


def kept(task: Callable[[], Tensor], own: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, beside what ``own`` holds anyway."""
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


def kinds() -> list[dict[str, Any]]:
    """Mixtures of 8 bases and rank 8 at 256 x 256, beside building every weight, and the flop."""
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

    torch.testing.assert_close(built(), ours(), rtol=1e-4, atol=1e-4)
    flop = multiplications(kind, B, I, H, C)
    dense = nn.Linear(I, I, bias=False)  # a dense product of as many multiplications
    wide = torch.randn(flop // (I * I), I, requires_grad=True)
    timings = paired(
        training(lambda: dense(wide), torch.randn(len(wide), I), [wide, dense.weight]),
        {"ours": training(ours, g, leaves), "built": training(built, g, leaves)},
        rounds=9,
        seconds=6,
    )
    row = {
        "kind": kind,
        "faster_than_built": timings["built"].median / timings["ours"].median,
        "x_dense_product_of_its_flop": timings["ours"].ratio,
        "ms": 1e3 * timings["ours"].median,
        "kept_MB": kept(ours, leaves) / 1e6,
        "built_kept_MB": kept(built, leaves) / 1e6,
    }
    show(row)
    return row


def multiplications(kind: str, B: int, I: int, H: int, C: int) -> int:  # noqa: E741
    K = r = 8
    shared = B * (C * H + I * I)
    if kind == "basis":
        return shared + B * (H * K + K * I * I)
    return shared + 2 * B * H * I * r + 2 * B * I * r


def full() -> list[dict[str, Any]]:
    """The hyper-network itself, beside the corrected code of the article."""
    shapes = ((64, 256), (256, 16)) if QUICK else ((64, 256), (256, 16), (256, 256))
    return [one_full(d, B) for d, B in shapes]


def one_full(d: int, B: int) -> dict[str, Any]:
    C, H = 128, 256
    torch.manual_seed(0)
    layer = ln.nn.DynamicLinear(d, d, C, kind="full", hidden_features=H, bias=False)
    x, condition = torch.randn(B, d, requires_grad=True), torch.randn(B, C)
    g = torch.randn(B, d)
    generator = nn.Sequential(nn.Linear(C, H), nn.ReLU(), nn.Linear(H, d * d, bias=False))
    base = nn.Parameter(torch.randn(d, d) / d**0.5)
    leaves = [x, *layer.parameters()]
    their_leaves = [x, base, *generator.parameters()]

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
    kept_by_us, kept_by_them = kept(ours, leaves), kept(built, their_leaves)
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


GRID = [
    (B, T, d, d, K)
    for d in (64, 256)
    for B, T in ((16, 1), (256, 1), (16, 16), (8, 128))
    for K in (4, 16, 64)
]


def forms() -> list[dict[str, Any]]:
    """24 shapes: what the cost model chose, beside the best of the three exact forms."""
    rows = [one_shape(*shape) for shape in (GRID[:8] if QUICK else GRID)]
    within = sum(row["chosen_over_best"] <= 1.1 for row in rows)
    print(f"within 10 % of the best: {within} of {len(rows)}")
    return rows


def one_shape(B: int, T: int, I: int, O: int, K: int) -> dict[str, Any]:  # noqa: E741
    torch.manual_seed(0)
    h, bank = torch.randn(B, K, requires_grad=True), torch.randn(K, I, O, requires_grad=True)
    x, g = torch.randn(B, T, I, requires_grad=True), torch.randn(B, T, O)

    def task(form: str) -> Callable[[], None]:
        return training(lambda: mix(h, bank, x, form=form), g, [h, bank, x])

    chosen = quickest(FORMS, B, T, I, O, K)
    tasks = {form: task(form) for form in FORMS if form != chosen}
    timings = paired(task(chosen), tasks, rounds=9, seconds=3)
    ratios = {chosen: 1.0, **{form: timings[form].ratio for form in tasks}}
    best = min(ratios, key=ratios.__getitem__)
    row = {"B": B, "T": T, "I": I, "O": O, "K": K, "chosen": chosen, "best": best}
    row |= {"chosen_over_best": 1 / ratios[best], "ms": 1e3 * timings["baseline"].median}
    row |= {f"{form}_over_chosen": ratio for form, ratio in ratios.items() if form != chosen}
    show(row)
    return row


def show(row: dict[str, Any]) -> None:
    parts = [f"{n} {v:.3g}" if isinstance(v, float) else f"{n} {v}" for n, v in row.items()]
    print(" | ".join(parts), flush=True)


PARTS = {f.__name__: f for f in (kinds, full, forms)}


def main() -> None:
    torch.set_num_threads(1)
    chosen = [sys.argv[sys.argv.index("--only") + 1]] if "--only" in sys.argv else list(PARTS)
    rows = {}
    for name in chosen:
        print(f"\n{name}")
        rows[name] = PARTS[name]()
    if chosen == list(PARTS) and not QUICK:
        save("dynamic", rows)


if __name__ == "__main__":
    main()
