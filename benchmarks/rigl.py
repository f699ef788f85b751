"""The ViT recipe with 90 % of its MLPs left out, by blocks: dense, fixed blocks, SET and RigL.

    python benchmarks/rigl.py                     # results/rigl.json, some ten minutes on one core
    python benchmarks/rigl.py --only RigL         # one way anew; the others stay in the file
    python benchmarks/rigl.py --seeds 0 --steps 50 # a dry run, which writes nothing
    python benchmarks/rigl.py --table             # write what the file says into the docs pages

Same model, images, order, augmentation and steps for all; only the matrices of the MLPs differ,
and at equal seed all but their values is equal. Accuracy is that after the last step, on the test
images; nothing is chosen by it.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from environment import parts, save_part, where, write_tables
from torch import nn

import learnables as ln
from learnables.recipes.vit.config import PRESETS, Config
from learnables.recipes.vit.crew import Crew
from learnables.recipes.vit.data import load_images
from learnables.recipes.vit.train import Job

DENSITY, BLOCK, EVERY = 0.1, 8, 25
MOST_POINTS = 1.0  # what RigL may lose, in points of accuracy
RULES: dict[str, ln.sparse.Rule | None] = {
    "dense": None,
    "fixed blocks": None,
    "SET": ln.sparse.SET(0.3),
    "RigL": ln.sparse.RigL(0.3),
}


def run(way: str, preset: str, seed: int, steps: int) -> dict[str, Any]:
    """Train once."""
    config = Config(**{**PRESETS[preset], "seed": seed, "max_steps": steps})
    images = load_images(config.data, config.data_dir)
    job = Job(config, Crew(torch.device("cpu")), images, None if way == "dense" else sparsify)
    evolution = None
    if (rule := RULES[way]) is not None:
        evolution = ln.sparse.evolve(
            job.model, job.optimizer, rule, every=EVERY, until=job.steps * 3 // 4, seed=seed
        )
    begun = time.process_time()
    for step in range(job.steps):
        job.step(step)
    seconds = time.process_time() - begun
    history = evolution.history if evolution is not None else []
    row = {
        "way": way,
        "seed": seed,
        "accuracy": job.measure().accuracy,
        "mlp_values": sum(p.numel() for p in matrices(job.model)),
        "parameters": job.parameters,
        "blocks_exchanged": sum(change.grown for change in history),
        "updates": len({change.step for change in history}),
        "steps": job.steps,
        "cpu_seconds": round(seconds, 1),
    }
    print(" | ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def sparsify(model: nn.Module) -> None:
    """The MLPs at 10 %, with blocks drawn at random and values by what each output really sees."""
    ln.sparsify(
        model, "blocks.*.mlp.*.weight", block=BLOCK, density=DENSITY, mask="random", draw=True
    )


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if ".mlp." in n and n.endswith("weight")]


TEXT = {
    "en": (
        "`learnables train vit --data {data}` with every matrix of its MLPs cut into blocks of "
        "{block} × {block}, of which a tenth is stored; {seeds} seeds, {steps} steps, exchanged "
        "every {every} steps for three quarters of the training; `python benchmarks/rigl.py` "
        "{where}:",
        "| MLPs | values in them | test accuracy, mean (lowest – highest) | below dense |",
        "points",
        {way: way for way in RULES},
        "One test image is {one:.2f} points: on these images the ways to choose blocks do not "
        "differ.",
    ),
    "zh": (
        "`learnables train vit --data {data}`，MLP 的每个矩阵都切成 {block} × {block} 的块，"
        "只存十分之一；"
        "{seeds} 个种子，{steps} 步，前四分之三的训练里每 {every} 步交换一次；"
        "`python benchmarks/rigl.py`{where}：",
        "| MLP | 其中的数值 | 测试准确率，平均（最低 – 最高） | 比稠密低 |",
        "个百分点",
        {"dense": "稠密", "fixed blocks": "固定的块", "SET": "SET", "RigL": "RigL"},
        "一张测试图像是 {one:.2f} 个百分点：在这些图像上，几种选块的做法没有差别。",
    ),
}


def table(language: str) -> str:
    """The result file as Markdown."""
    found = parts("rigl")
    head, columns, points, names, closing = TEXT[language]
    first = found["dense"]
    head = head.format(
        data=first["data"],
        block=first["block"],
        every=first["every"],
        seeds=len(first["rows"]),
        steps=first["rows"][0]["steps"],
        where=where(first["environment"], language),
    )
    lines = [head, "", columns, "|---|---|---|---|"]
    dense = mean(first["rows"])
    for way in (way for way in RULES if way in found):
        rows = found[way]["rows"]
        accuracy = [100 * row["accuracy"] for row in rows]
        lost = "" if way == "dense" else f"{dense - mean(rows):.2f} {points}"
        lines.append(
            f"| {names[way]} | {rows[0]['mlp_values']:,} | {mean(rows):.2f} % "
            f"({min(accuracy):.2f} – {max(accuracy):.2f}) | {lost} |"
        )
    lines += ["", closing.format(one=100 / len(load_images(first["data"]).test))]
    return "\n".join(lines)


def mean(rows: list[dict[str, Any]]) -> float:
    return 100 * statistics.mean(row["accuracy"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="digits", choices=["digits", "fashion-mnist"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="end after so many; writes nothing")
    parser.add_argument("--only", choices=list(RULES), default=None)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        write_tables("sparse", "rigl", table)
        return
    torch.set_num_threads(1)
    setting = {"data": given.preset, "density": DENSITY, "block": BLOCK, "every": EVERY}
    for way in [given.only] if given.only else list(RULES):
        rows = [run(way, given.preset, seed, given.steps) for seed in given.seeds]
        if not given.steps:
            save_part("rigl", way, rows, **setting)
    found = parts("rigl")
    if given.steps or not {"dense", "RigL"} <= set(found):
        return
    lost = mean(found["dense"]["rows"]) - mean(found["RigL"]["rows"])
    print(f"RigL is {lost:.2f} points below dense")
    if lost > MOST_POINTS:
        raise SystemExit(f"wanted: at most {MOST_POINTS}")


if __name__ == "__main__":
    main()
