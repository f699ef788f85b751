"""A grafted model in fp16 inside three trainers: audited clean, and pulled on real steps only.

On a CPU neither Lightning nor Accelerate makes a loss scaler; each is handed one here, in the place
where its own would be. The second step overflows.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import learnables as ln
from learnables.auditing.report import Report
from learnables.watching import Run

STEPS, BATCH = 6, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = self.head(self.body(x)).float()
        return out if labels is None else {"loss": (out - labels).square().mean()}


def grafted() -> Net:
    torch.manual_seed(0)
    model = Net()
    ln.graft(model, "colour", Colour(), at="body", where="input")
    ln.graft(model, "scale", ln.nn.LayerScale(8, 0.5), at="body.0")
    ln.graft(model, "delta", ln.nn.LowRankDelta(8, 8, rank=1), at="body.2.weight")
    ln.train_only(model, ["colour.*", "scale.*", "delta.*", "head.*"])
    return model


class Colour(nn.Module):
    """A matrix that decays toward the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = ln.parameter(torch.eye(3), weight_decay="init")

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    x, y = torch.randn(STEPS * BATCH, 3), torch.randn(STEPS * BATCH, 2)
    y[BATCH : 2 * BATCH] += math.inf
    return list(zip(x, y, strict=True))


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10)


def in_lightning(model: Net, folder: Path) -> tuple[Report, Any]:
    import lightning as L
    from lightning.pytorch.plugins import MixedPrecision

    from learnables.integrations.lightning import LearnablesCallback, build_optimizer

    class Lit(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.inner(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return build_optimizer(self, torch.optim.SGD, lr=0.1, weight_decay=0.1)

    callback = LearnablesCallback(watch=1, to=folder, budget=None)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler())],
    )
    trainer.fit(Lit(), torch.utils.data.DataLoader(data(), batch_size=BATCH))
    return callback.report, callback.watcher.path


def in_transformers(model: Net, folder: Path) -> tuple[Report, Any]:
    from transformers import Trainer, TrainingArguments

    from learnables.integrations import transformers as ours

    args = TrainingArguments(
        str(folder / "out"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        max_grad_norm=0.0,
        optim="sgd",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        fp16=True,
        train_sampling_strategy="sequential",
    )
    callback = ours.LearnablesCallback(watch=1, to=folder / "run", budget=None)
    rows = [{"x": x, "labels": y} for x, y in data()]
    bridge = ours.optimizer_cls_and_kwargs(model, args)
    trainer = Trainer(
        model,
        args,
        train_dataset=rows,
        optimizer_cls_and_kwargs=bridge,
        callbacks=[callback],
    )
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, scaler()
    trainer.train()
    return callback.report, callback.watcher.path


def in_accelerate(model: Net, folder: Path) -> tuple[Report, Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    from learnables.integrations import accelerate as ours

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.native_amp, accelerator.scaler = True, scaler()
    loader = torch.utils.data.DataLoader(data(), batch_size=BATCH)
    wrapped, optimizer, loader = ours.prepare(
        accelerator, model, loader, optimizer=torch.optim.SGD, lr=0.1, weight_decay=0.1
    )
    watching = ours.watch(accelerator, wrapped, optimizer, every=1, to=folder, budget=None)
    with (
        watching as watcher,
        ln.observe(wrapped, optimizer.optimizer, scaler=accelerator.scaler) as seen,
    ):
        for x, y in loader:
            accelerator.backward(wrapped(x, y)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    assert seen.report is not None
    return seen.report, watcher.path


def by_hand(model: Net) -> None:
    """Slow twin: autocast and a scaler in a plain loop, decay toward the identity by hand."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = ln.param_groups(model, lr=0.1, weight_decay=0.1)
    matrix, scaling = model.colour.matrix, scaler()
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for x, y in torch.utils.data.DataLoader(data(), batch_size=BATCH):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(x, y)["loss"]
        scaling.scale(loss).backward()
        before = scaling.get_scale()
        scaling.unscale_(optimizer)
        if all(p.grad.isfinite().all() for p in trained):
            with torch.no_grad():
                matrix += 0.1 * 0.1 * (torch.eye(3) - matrix)
        scaling.step(optimizer)
        scaling.update()
        assert scaling.get_scale() in (before, before / 2)


@pytest.mark.parametrize("trainer", [in_lightning, in_transformers, in_accelerate])
def test_a_grafted_model_in_fp16_ends_where_a_plain_loop_does(
    trainer: Callable[[Net, Path], tuple[Report, Any]], tmp_path: Path
) -> None:
    model, twin = grafted(), grafted()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    report, path = trainer(model, tmp_path)
    by_hand(twin)
    assert report.ok, str(report)
    assert [o.skipped for o in Run(path).observations] == [k == 1 for k in range(STEPS)]
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()))
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name]) != p.requires_grad, name
