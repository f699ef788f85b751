"""The same question inside other people's trainers: is the recorded gradient the consumed one?

Lightning (which steps with a closure and clips inside it), the transformers Trainer, Accelerate
(whose optimizer does nothing while it accumulates), and optimizers that step inside the backward.
As in watch_gradients.py, parameters are zero before each step and SGD with learning rate 1 leaves
minus the consumed gradient behind. In fp16 the second step overflows, and has to be marked.

Accelerate, and with it the Trainer, makes a scaler for accelerators only, and on a CPU silently
trains in fp32; Lightning takes bf16 instead. So they are handed one for the CPU here, in the places
where theirs would be; all that they do with it is their own code.

    .venv-integrations/bin/python benchmarks/watch_trainers.py
"""

import itertools
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from environment import save
from torch import Tensor, nn
from watch_gradients import STEPS, Model, judge

import learnables as ln
from learnables.watching import Run

CLIP = 0.05
SCALE = 2.0**10
ABSENT = "needs make test-integrations environment"


Row = Callable[..., dict[str, Any]]


class Tape:
    """What the steps of one model really consumed, and what a tensor hook saw."""

    def __init__(self, model: nn.Module, scaled: bool = False) -> None:
        self.model, self.scaled = model, scaled
        self.consumed: list[dict[str, Tensor]] = []
        self.moved: list[dict[str, float]] = []
        self._hooked: dict[str, float] = {}
        for name, p in model.named_parameters():
            p.register_hook(lambda g, name=name: self._hooked.__setitem__(name, g.norm().item()))

    def before(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p.zero_()

    def after(self) -> None:
        values = {n: -p.detach().clone() for n, p in self.model.named_parameters()}
        self.consumed.append(values)
        self.moved.append(dict(self._hooked))

    def judged(self, path: Any) -> dict[str, Any]:
        return judge(Run(path), self.consumed, self.moved, self.scaled)


def batches(accumulate: int, overflows: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for step, _ in itertools.product(range(STEPS), range(accumulate)):
        x, y = torch.randn(8, 3, 24, generator=generator), torch.randn(8, 6, generator=generator)
        yield x, (y + math.inf if overflows and step == 1 else y)


def loader(accumulate: int, overflows: bool) -> Any:
    x, y = map(torch.cat, zip(*batches(accumulate, overflows), strict=True))
    data = torch.utils.data.TensorDataset(x, y)
    return torch.utils.data.DataLoader(data, batch_size=8)


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE)


def lightning(folder: str, accumulate: int, clip: bool, scaled: bool = False) -> dict[str, Any]:
    import lightning as L
    from lightning.pytorch.plugins import MixedPrecision

    from learnables.integrations.lightning import LearnablesCallback

    class Lit(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model()
            self.steps = 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

        def on_train_start(self) -> None:
            self.tape = Tape(self, scaled)

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            self.tape.before()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return (self.inner(batch[0]) - batch[1]).square().mean()

        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step > self.steps:
                self.steps = self.trainer.global_step
                self.tape.after()

    model = Lit()
    callback = LearnablesCallback(audit=0, watch=1, to=folder, budget=None)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=CLIP if clip else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler())] if scaled else None,
    )
    trainer.fit(model, loader(accumulate, scaled))
    return model.tape.judged(callback.watcher.path)


def transformers(folder: str, accumulate: int, clip: bool, scaled: bool = False) -> dict[str, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from learnables.integrations.transformers import LearnablesCallback

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.inner(x) - labels).square().mean()}

    model = Wrapped()
    tape = Tape(model, scaled)

    class Taping(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            tape.before()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            tape.after()

    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    callback = LearnablesCallback(audit=0, watch=1, to=folder, budget=None)
    data = [
        {"x": x, "labels": y}
        for xs, ys in batches(accumulate, scaled)
        for x, y in zip(xs, ys, strict=True)
    ]
    trainer = Trainer(
        model,
        TrainingArguments(
            f"{folder}-out",
            per_device_train_batch_size=8,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=CLIP if clip else 0.0,
            num_train_epochs=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
            fp16=scaled,
            train_sampling_strategy="sequential",  # the batch that overflows is one step
        ),
        train_dataset=data,
        optimizers=(sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda _: 1.0)),
        callbacks=[callback, Taping()],
    )
    if scaled:
        trainer.accelerator.native_amp, trainer.accelerator.scaler = True, scaler()
    trainer.train()
    return tape.judged(callback.watcher.path)


def accelerate(folder: str, accumulate: int, clip: bool, scaled: bool = False) -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    from learnables.integrations.accelerate import watch

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        mixed_precision="fp16" if scaled else "no",
    )
    if scaled:
        accelerator.native_amp, accelerator.scaler = True, scaler()
    model = Model()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, batches_ = accelerator.prepare(model, sgd, loader(accumulate, scaled))
    tape = Tape(model, scaled)
    with watch(accelerator, model, optimizer, every=1, to=folder, budget=None) as watcher:
        for x, y in batches_:
            with accelerator.accumulate(model):
                if not accelerator.sync_gradients or accumulate == 1:
                    tape.before()
                accelerator.backward((model(x) - y).square().mean())
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                if accelerator.sync_gradients:
                    tape.after()
                optimizer.zero_grad()
    return tape.judged(watcher.path)


def fp16(run: Row) -> Row:
    def scaled(folder: str, accumulate: int, clip: bool) -> dict[str, Any]:
        return run(f"{folder}-fp16", accumulate, clip, True)

    return scaled


def in_backward(folder: str, accumulate: int, clip: bool) -> dict[str, Any]:
    model = Model()
    of = {p: torch.optim.SGD([p], lr=1.0) for p in model.parameters()}

    def update(p: Tensor) -> None:
        if clip:
            nn.utils.clip_grad_norm_([p], CLIP)
        of[p].step()
        of[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    tape = Tape(model)
    with ln.watch(model, of.values(), every=1, to=folder, budget=None) as watcher:
        for x, y in batches(1):
            tape.before()
            (model(x) - y).square().mean().backward()
            tape.after()
    return tape.judged(watcher.path)


ROWS: dict[str, tuple[str, Row, tuple[int, ...]]] = {
    "Lightning": ("lightning", lightning, (1, 2)),
    "HF Trainer": ("transformers", transformers, (1, 2)),
    "Accelerate": ("accelerate", accelerate, (1, 2)),
    "Lightning, fp16": ("lightning", fp16(lightning), (1, 2)),
    "HF Trainer, fp16": ("transformers", fp16(transformers), (1, 2)),
    "Accelerate, fp16": ("accelerate", fp16(accelerate), (1, 2)),
    "optimizer in backward": ("torch", in_backward, (1,)),
}


def rows(name: str, folder: str) -> list[dict[str, Any]]:
    """Each cell of one trainer: micro-batches × clipping; empty where its package is absent."""
    package, run, micro_batches = ROWS[name]
    if find_spec(package) is None:
        return []
    found = []
    for accumulate, clip in itertools.product(micro_batches, (False, True)):
        torch.manual_seed(0)
        at = str(Path(folder) / f"{run.__name__}-{accumulate}-{clip}")
        cell = {"trainer": name, "accumulation": accumulate, "clip": clip}
        found.append({**cell, **run(at, accumulate, clip)})
    return found


def table(folder: str) -> list[dict[str, Any]]:
    """Print one line for each trainer; returns all cells."""
    every = []
    for name in ROWS:
        cells = rows(name, folder)
        every += cells
        good = sum(cell["equal"] and cell["skips marked"] for cell in cells)
        said = f"equal in {good} of {len(cells)} cells" if cells else ABSENT
        stages = ", ".join(sorted({stage for cell in cells for stage in cell["stage"]}))
        print(f"{name:22} {said}{f'; read at the {stages}' if stages else ''}")
    return every


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.integrations.shim import ensure_torchvision

    ensure_torchvision()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = table(folder)
    good = sum(cell["equal"] and cell["skips marked"] for cell in found)
    trainers = {cell["trainer"] for cell in found}
    if "--no-save" not in sys.argv and len(trainers) == len(ROWS):
        save("watch_trainers", found, good=good, cells=len(found))
    return good != len(found)


if __name__ == "__main__":
    sys.exit(main())
