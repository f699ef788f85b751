"""One training, three loops: plain torch, Lightning, and the Trainer of transformers.

All three take the same batches in the same order, the same groups of parameters, AdamW and a cosine
down to zero, and end at the same values. The audit of the first iterations has to be clean.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

import learnables as ln

After = Callable[[], object]


class Task(nn.Module):
    """A classifier that answers with its loss, as transformers' Trainer wants it."""

    accepts_loss_kwargs = False  # the Trainer would hand on its count of items

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        found = {"logits": self.model(**inputs).float()}
        if labels is not None:
            found["loss"] = nn.functional.cross_entropy(found["logits"], labels)
        return found


class Rows(Dataset[dict[str, Tensor]]):
    """Tensors of equal length by name, as rows."""

    def __init__(self, **columns: Tensor):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: column[i] for name, column in self.columns.items()}


class Order(Sampler[int]):
    """Another order in each epoch, the same in all loops: they all call ``set_epoch``."""

    def __init__(self, count: int):
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        seeded = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(self.count, generator=seeded).tolist())


def batches(rows: Rows, batch: int) -> DataLoader[dict[str, Tensor]]:
    """Whole batches."""
    return DataLoader(rows, batch_size=batch, sampler=Order(len(rows)), drop_last=True)


def scores(task: Task, rows: Rows, bf16: bool = False) -> float:
    """Share of rows that are classified rightly."""
    was, right = task.training, 0
    task.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for batch in DataLoader(rows, batch_size=50):
            labels = batch.pop("labels")
            right += int((task(**batch)["logits"].argmax(1) == labels).sum())
    task.train(was)
    return right / len(rows)


# --- plain torch ---------------------------------------------------------------------------------


def plain(
    task: Task,
    rows: Rows,
    *,
    lr: float,
    epochs: int,
    batch: int,
    policy: Any = None,
    warmup: int = 0,
    bf16: bool = False,
    after_epoch: After = lambda: None,
) -> None:
    """The loop that one writes oneself."""
    loader = batches(rows, batch)
    optimizer = torch.optim.AdamW(ln.param_groups(task, lr=lr, weight_decay=0.01, policy=policy))
    ln.attach(task, optimizer)
    steps = epochs * len(loader)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: half_cosine(step, steps, warmup)
    )
    task.train()
    with ln.observe(task, optimizer) as seen:
        for epoch in range(epochs):
            loader.sampler.set_epoch(epoch)
            for rows_of_it in loader:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = task(**rows_of_it)["loss"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cosine.step()
            after_epoch()
    seen.report.raise_for_errors()


def half_cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the rate: a straight rise over ``warmup`` steps, then from 1 to 0 at the end."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


# --- Lightning -----------------------------------------------------------------------------------


def lightning(
    task: Task,
    rows: Rows,
    *,
    lr: float,
    epochs: int,
    batch: int,
    policy: Any = None,
    warmup: int = 0,
    bf16: bool = False,
    after_epoch: After = lambda: None,
) -> None:
    """`LearnablesCallback` audits; `build_optimizer` makes the groups and attaches."""
    import lightning as L

    from learnables.integrations.lightning import LearnablesCallback, build_optimizer

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.task = task

        def training_step(self, rows_of_it: dict[str, Tensor], index: int) -> Tensor:
            return self.task(**rows_of_it)["loss"]

        def configure_optimizers(self) -> Any:
            optimizer = build_optimizer(
                self, torch.optim.AdamW, lr=lr, weight_decay=0.01, policy=policy
            )
            steps = self.trainer.estimated_stepping_batches
            cosine = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: half_cosine(step, steps, warmup)
            )
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": cosine, "interval": "step"},
            }

        def on_train_epoch_end(self) -> None:
            after_epoch()

    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision="bf16-mixed" if bf16 else "32-true",
        callbacks=[LearnablesCallback(fail=True, watch=0)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), batches(rows, batch))


# --- transformers --------------------------------------------------------------------------------


def transformers(
    task: Task,
    rows: Rows,
    *,
    lr: float,
    epochs: int,
    batch: int,
    policy: Any = None,
    warmup: int = 0,
    bf16: bool = False,
    after_epoch: After = lambda: None,
) -> None:
    """`LearnablesCallback` audits and attaches; the groups come by `optimizer_cls_and_kwargs`."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from learnables.integrations.transformers import LearnablesCallback, optimizer_cls_and_kwargs

    class EachEpoch(TrainerCallback):
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            after_epoch()

    class InOurOrder(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return self.accelerator.prepare(batches(rows, batch))

    args = TrainingArguments(
        "runs/trainer",
        learning_rate=lr,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=warmup,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        optim="adamw_torch",
        max_grad_norm=0.0,
        bf16=bf16,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
    )
    InOurOrder(
        task,
        args,
        train_dataset=rows,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(task, args, policy=policy),
        callbacks=[LearnablesCallback(fail=True, watch=0), EachEpoch()],
    ).train()


LOOPS = {"plain": plain, "lightning": lightning, "transformers": transformers}
