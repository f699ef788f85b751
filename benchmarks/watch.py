"""What watching costs: bytes of a record, seconds of a look, slowdown of ``learnables train vit``.

    python benchmarks/watch.py [--epochs N] [--threads N] [--no-save]

The slowdown is that of the recipe itself: its own loop over the digits, from the first step to the
last, with the watcher it has by default, without any, and with two peers. All four run in one
process, an epoch each in turns, so that whatever the machine does hits all alike; an epoch with the
watcher and the one without beside it are a pair. Both the clock of the CPU and that on the wall are
read; the first is blind to neighbours. Writes results/watch.json and the tables in
docs/*/watch.md.
"""

import argparse
import itertools
import sqlite3
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from environment import environment, save, write_tables
from stats import tensorboard, vit_shapes, wandb_recipe
from torch import nn

import learnables as ln
from learnables.recipes.vit.config import Config
from learnables.recipes.vit.crew import Crew, assemble
from learnables.recipes.vit.data import ImageSet, load_images
from learnables.recipes.vit.interrupt import Interrupt
from learnables.recipes.vit.progress import Silent
from learnables.recipes.vit.train import Job, loop
from learnables.watching import Run, Watcher

PEER_EVERY = Config().watch_every  # steps: as often as the recipe asks of its watcher


def record() -> dict[str, float]:
    """Size of the record of one look at ViT-B, and its time; no module that computes is needed."""
    model = nn.Module()
    for i, shape in enumerate(vit_shapes(768)):
        p = nn.Parameter(torch.randn(shape) * 0.02)
        p.grad = torch.randn(shape) * torch.rand(shape) ** 3 * 1e-3
        model.register_parameter(f"p{i}", p)
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


class Unwatched:
    """Stands where the loop has its watcher."""

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass


class Turns(Silent):
    """Shows nothing, but at the end of each epoch notes what it took and lets the next one train.

    Attributes:
        wall: Seconds of each epoch.
        cpu: Seconds of all threads, of each epoch; only one loop runs at a time.
    """

    def __init__(self, name: str) -> None:
        self.name, self.wall, self.cpu = name, [], []
        self.go, self.rested = threading.Semaphore(0), threading.Semaphore(0)
        self.watcher: Watcher | None = None
        self.failure: BaseException | None = None

    def begin(self) -> None:
        left = time.perf_counter()
        self.go.acquire()
        self.clocks = time.perf_counter(), time.process_time()
        if self.watcher is not None and self.watcher._resumed_at is not None:
            self.watcher._resumed_at += self.clocks[0] - left  # to its governor, no time has passed

    def epoch(self, epoch: int, accuracy: float) -> None:
        self.wall.append(time.perf_counter() - self.clocks[0])
        self.cpu.append(time.process_time() - self.clocks[1])
        self.rested.release()
        self.begin()


def peer(job: Job, look: Callable[[list[torch.Tensor]], object]) -> None:
    """Have ``look`` called with parameters and gradients every so many steps."""
    steps = itertools.count(1)

    def hook(*_: object) -> None:
        if next(steps) % PEER_EVERY == 0:
            params = [p for p in job.model.parameters() if p.grad is not None]
            look([p.detach() for p in params] + [p.grad for p in params if p.grad is not None])

    job.optimizer.register_step_pre_hook(hook)


def run_one(
    turns: Turns, config: Config, crew: Crew, images: ImageSet, folder: Path, threads: int
) -> None:
    """Train from the first step to the last, an epoch whenever it is our turn."""
    torch.set_num_threads(threads)
    turns.go.acquire()  # while the job is made nobody else draws random numbers
    job = Job(config, crew, images)
    watcher: Any = Unwatched()
    if turns.name == "watched":
        watcher = turns.watcher = job.watch(folder / turns.name, 0, turns)
    elif turns.name == "TensorBoard add_histogram":
        peer(job, tensorboard())
    elif turns.name == "wandb.watch recipe":
        peer(job, wandb_recipe)
    turns.rested.release()
    try:
        turns.begin()
        loop(job, 0, folder, watcher, turns, Interrupt())
    except BaseException as error:
        turns.failure = error
        turns.rested.release()
    if turns.watcher is not None:
        turns.watcher.close()


NAMES = ("not watched", "watched", "TensorBoard add_histogram", "wandb.watch recipe")


def slowdown(epochs: int, threads: int) -> dict[str, Any]:
    """Train all of them side by side; what each costs beside the one that is not watched."""
    config = Config(epochs=epochs, save_seconds=1e9, device="cpu")
    with tempfile.TemporaryDirectory() as folder, assemble("cpu") as crew:
        images = load_images(
            config.data,
            config.data_dir,
            image_size=config.image_size,
            channels=config.channels,
        )
        all_turns = [Turns(name) for name in NAMES]
        workers = [
            threading.Thread(
                target=run_one, args=(turns, config, crew, images, Path(folder), threads)
            )
            for turns in all_turns
        ]
        for worker in workers:
            worker.start()
        for number in range(epochs + 2):  # the first is for making the job, the last for ending it
            for i in range(len(NAMES)):
                turns = all_turns[(i + number) % len(NAMES)]
                turns.go.release()
                if number <= epochs:
                    turns.rested.acquire()
                if turns.failure is not None:
                    raise turns.failure
        for worker in workers:
            worker.join()
        plain, watched = all_turns[:2]
        assert watched.watcher is not None
        assert watched.watcher.failed is None
        looks = [o.step for o in watched.watcher.run().observations]
        overhead = watched.watcher.governor.overhead
    steps = watched.watcher.step
    gaps = [b - a for a, b in itertools.pairwise(looks)]
    return {
        "epochs": epochs,
        "steps": steps,
        "threads": threads,
        "asked_every": config.watch_every,
        "budget": config.watch_budget,
        "looks": len(looks),
        "chosen_interval": statistics.median(gaps) if gaps else None,
        "governors_own_account": overhead,
        "rows": [
            {"name": turns.name, "cpu": against(turns.cpu, plain.cpu)}
            | {"wall": against(turns.wall, plain.wall)}
            for turns in all_turns[1:]
        ],
    }


def against(these: list[float], those: list[float]) -> dict[str, float]:
    """Mean slowdown over the pairs, its one-sided 95 % bound, and that of all pairs together."""
    ratios = [one / other - 1 for one, other in zip(these, those, strict=True)]
    mean, error = statistics.fmean(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5
    z = statistics.NormalDist().inv_cdf(0.95)
    t = z + (z**3 + z) / (4 * (len(ratios) - 1))  # Student's, to 0.2 % from ten pairs on
    return {
        "mean": mean,
        "upper_95": mean + t * error,
        "median": statistics.median(ratios),
        "in_all": sum(these) / sum(those) - 1,
        "pairs": len(ratios),
    }


def table(cost: dict[str, Any], words: dict[str, str]) -> list[str]:
    every = cost["chosen_interval"] or cost["steps"]
    head = "| | {mean} | {upper} | {wall} | {looks} |".format(**words)
    lines = [words["intro"], "", head, "|---|---|---|---|---|"]
    for row in cost["rows"]:
        name = words.get(row["name"], row["name"])
        cpu, wall = row["cpu"], row["wall"]
        done = f"{cost['looks']}, {words['every']} {every:g}"
        if row["name"] != "watched":
            done = f"{cost['steps'] // PEER_EVERY}, {words['every']} {PEER_EVERY}"
        lines.append(
            f"| {name} | {cpu['mean']:.2%} | {cpu['upper_95']:.2%} | {wall['mean']:.2%} | {done} |"
        )
    here = environment()
    told = {**cost, **here, "pairs": cost["rows"][0]["cpu"]["pairs"], "date": here["date"][:10]}
    return [*lines, "", words["where"].format(**told)]


ENGLISH = {
    "intro": (
        "What is left to see on a clock is measured on the loop of `learnables train vit` itself "
        "(`python benchmarks/watch.py`):"
    ),
    "mean": "mean slowdown, CPU time",
    "upper": "95 % upper bound",
    "wall": "mean slowdown, wall clock",
    "looks": "looks",
    "every": "every",
    "watched": "`ln.watch` as the recipe has it",
    "TensorBoard add_histogram": "TensorBoard `add_histogram`, parameters and gradients",
    "wandb.watch recipe": "what `wandb.watch` does to each tensor",
    "where": (
        "The whole recipe on the digits, {steps} steps, {pairs} pairs of epochs in turns; {cpu}, "
        "{threads} thread, torch {torch}, {date}. The recipe asks for a look every {asked_every} "
        "steps and allows {budget:.0%}; by the governor's own account it took "
        "{governors_own_account:.2%}."
    ),
}
CHINESE = {
    "intro": (
        "钟表上还能看出多少，是在 `learnables train vit` 自己的训练循环上量的"
        "（`python benchmarks/watch.py`）："
    ),
    "mean": "平均减速（CPU 时间）",
    "upper": "95 % 上界",
    "wall": "平均减速（墙钟）",
    "looks": "观测次数",
    "every": "间隔",
    "watched": "示例训练默认的 `ln.watch`",
    "TensorBoard add_histogram": "TensorBoard `add_histogram`，参数与梯度",
    "wandb.watch recipe": "`wandb.watch` 对每个张量所做的事",
    "where": (
        "完整的示例训练（digits），{steps} 步，{pairs} 对轮流进行的 epoch；{cpu}，{threads} 线程，"
        "torch {torch}，{date}。示例要求每 {asked_every} 步观测一次，允许占用 {budget:.0%}；"
        "调速器自己的账上用了 {governors_own_account:.2%}。"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60, help="pairs, at least 20 to publish")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    size, cost = record(), slowdown(given.epochs, given.threads)
    print(
        f"record of one look at ViT-B: {size['bytes'] / 1000:.1f} kB, {size['look_seconds']:.2f} s"
    )
    print("\n".join(table(cost, ENGLISH)))
    if not given.no_save:
        save("watch", {"record": size, "slowdown": cost})
        words = {"en": ENGLISH, "zh": CHINESE}
        write_tables("watch", "watch", lambda language: "\n".join(table(cost, words[language])))


if __name__ == "__main__":
    main()
