"""What watching costs: bytes of a record, seconds of a look, slowdown of ``learnables train vit``.

    python benchmarks/watch.py [--rounds N] [--threads N] [--no-save]

The slowdown is that of the recipe itself: its own loop over the digits, from the first step to the
last. One model is trained; the watcher that the recipe has by default, two peers and twice nobody
take turns in watching it, two steps each. Two models side by side would not do: where their memory
happens to lie makes one of them quicker than its twin by more than watching costs. In a round of
five epochs each has every place within an epoch once, so each meets all that the loop does; who
follows whom changes from round to round. A pair is what one of them and nobody took of a round.
What twice nobody differ by is the noise. Both the clock of the CPU and that on the wall are read;
the first is blind to neighbours. Writes results/watch.json and the tables in docs/*/watch.md.
"""

import argparse
import itertools
import math
import sqlite3
import statistics
import tempfile
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
from learnables.recipes.vit.crew import assemble
from learnables.recipes.vit.data import load_images
from learnables.recipes.vit.interrupt import Interrupt
from learnables.recipes.vit.progress import Silent
from learnables.recipes.vit.train import Job, loop
from learnables.watching import Run

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


class Nobody:
    """A contender that watches nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on(self) -> None:
        """Begin to watch, or go on."""

    def off(self) -> None:
        """Stop for a while, and leave nothing behind in the optimizer."""

    def log_scalars(self, values: Mapping[str, float]) -> None:
        """What the loop has to say."""


class Peer(Nobody):
    """``look`` is called with parameters and gradients every so many steps."""

    def __init__(self, name: str, job: Job, look: Callable[[list[torch.Tensor]], object]) -> None:
        super().__init__(name)
        self.job, self.look, self.steps = job, look, itertools.count(1)

    def on(self) -> None:
        self.handle = self.job.optimizer.register_step_pre_hook(self.hook)

    def off(self) -> None:
        self.handle.remove()

    def hook(self, *_: object) -> None:
        if next(self.steps) % PEER_EVERY == 0:
            params = [p for p in self.job.model.parameters() if p.grad is not None]
            self.look([p.detach() for p in params] + [p.grad for p in params if p.grad is not None])


class Ours(Nobody):
    """The watcher that the recipe makes; while it is off, no time passes to its governor."""

    def __init__(self, name: str, job: Job, folder: Path) -> None:
        super().__init__(name)
        self.optimizer, self.watcher = job.optimizer, job.watch(folder, 0, Silent())
        (self.handle,) = self.watcher._handles.values()
        self.off()

    def on(self) -> None:
        self.optimizer._optimizer_step_pre_hooks[self.handle.id] = self.hook
        if self.watcher._resumed_at is not None:
            self.watcher._resumed_at += time.perf_counter() - self.left

    def off(self) -> None:
        self.watcher._remove_after(self.optimizer)
        self.hook = self.optimizer._optimizer_step_pre_hooks.pop(self.handle.id)
        self.left = time.perf_counter()

    def log_scalars(self, values: Mapping[str, float]) -> None:
        self.watcher.log_scalars(self.watcher.step, values)


class Turns:
    """Stands where the loop has its watcher, and lets the contenders take turns.

    Attributes:
        wall: Contender → seconds of each round, from the first step of its turns to the next turn.
        cpu: The same by the clock of the process.
    """

    def __init__(self, contenders: list[Nobody], job: Job) -> None:
        many, turns = len(contenders), job.steps_per_epoch // STEPS
        if job.steps_per_epoch % STEPS or math.gcd(many, turns) > 1:
            raise ValueError(f"{many} contenders do not each meet all {turns} turns of an epoch")
        self.contenders, self.round = contenders, many * job.steps_per_epoch
        self.wall: dict[str, list[float]] = {c.name: [] for c in contenders}
        self.cpu: dict[str, list[float]] = {c.name: [] for c in contenders}
        self.at, self.step = self.contender(0), job.step
        job.step = self.one

    def contender(self, step: int) -> Nobody:
        many = len(self.contenders)
        stride = 1 + step // self.round % (many - 1)
        return self.contenders[step // STEPS * stride % many]

    def one(self, step: int) -> torch.Tensor:
        """A step of the job, by whose turn it is."""
        if step % STEPS == 0:
            if step:
                self.end(step - 1)
            self.at = self.contender(step)
            self.at.on()
            self.clocks = time.perf_counter(), time.process_time()
        return self.step(step)

    def end(self, step: int) -> None:
        """The turn that ``step`` belongs to is over."""
        spent = time.perf_counter() - self.clocks[0], time.process_time() - self.clocks[1]
        self.at.off()
        round_ = step // self.round
        for clock, seconds in zip((self.wall, self.cpu), spent, strict=True):
            rounds = clock[self.at.name]
            if len(rounds) == round_:
                rounds.append(seconds)
            else:
                rounds[round_] += seconds

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.at.log_scalars(values)


STEPS = 2  # of a turn
NOBODY, NOISE = "not watched", "not watched, again"


def slowdown(rounds: int, threads: int) -> dict[str, Any]:
    """Train while all of them take turns; what each costs beside nobody."""
    config = Config(epochs=5 * rounds, save_seconds=1e9, device="cpu")
    with tempfile.TemporaryDirectory() as folder, assemble("cpu") as crew:
        images = load_images(
            config.data,
            config.data_dir,
            image_size=config.image_size,
            channels=config.channels,
        )
        job = Job(config, crew, images)
        ours = Ours("watched", job, Path(folder))
        turns = Turns(
            [
                Nobody(NOBODY),
                ours,
                Peer("TensorBoard add_histogram", job, tensorboard()),
                Nobody(NOISE),
                Peer("wandb.watch recipe", job, wandb_recipe),
            ],
            job,
        )
        watching: Any = turns
        loop(job, 0, Path(folder), watching, Silent(), Interrupt())
        turns.end(job.steps - 1)
        ours.on()
        assert ours.watcher.failed is None
        looks = [o.step for o in ours.watcher.run().observations]
        overhead, steps = ours.watcher.governor.overhead, ours.watcher.step
        ours.watcher.close()
    gaps = [b - a for a, b in itertools.pairwise(looks)]
    return {
        "rounds": rounds,
        "steps": steps,
        "threads": threads,
        "asked_every": config.watch_every,
        "budget": config.watch_budget,
        "looks": len(looks),
        "chosen_interval": statistics.median(gaps) if gaps else None,
        "governors_own_account": overhead,
        "rows": [
            {
                "name": name,
                "cpu": against(turns.cpu[name], turns.cpu[NOBODY]),
                "wall": against(turns.wall[name], turns.wall[NOBODY]),
            }
            for name in ("watched", "TensorBoard add_histogram", "wandb.watch recipe", NOISE)
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
        if row["name"] == NOISE:
            done = ""
        elif row["name"] != "watched":
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
    NOISE: "nobody, again: the noise",
    "where": (
        "The whole recipe on the digits, {steps} steps by each in {pairs} rounds of turns, with "
        "nobody in between; {cpu}, {threads} thread, torch {torch}, {date}. The recipe asks for a "
        "look every {asked_every} steps and allows {budget:.2%}; by the governor's own account it "
        "took {governors_own_account:.2%}."
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
    NOISE: "仍不观测：即噪声",
    "where": (
        "完整的示例训练（digits），各 {steps} 步，分 {pairs} 轮交替进行；{cpu}，{threads} 线程，"
        "torch {torch}，{date}。示例要求每 {asked_every} 步观测一次，允许占用 {budget:.2%}；"
        "调速器自己的账上用了 {governors_own_account:.2%}。"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=150, help="pairs, at least 20 to publish")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    size, cost = record(), slowdown(given.rounds, given.threads)
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
