"""A fit on two processes with the callback; rank 0 prints what was recorded. Run by its test."""

import lightning as L
import torch
from torch import Tensor, nn

import learnables as ln
from learnables.integrations.lightning import LearnablesCallback, build_optimizer
from learnables.launch import leave
from learnables.watching import Run


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.scale = ln.parameter(8, init=ln.init.ones(), weight_decay="init")
        self.fc = nn.Linear(8, 1)
        self.lost = nn.Parameter(torch.zeros(3))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return (self.fc(batch[0] * self.scale) - 1).square().mean() + 0 * self.lost.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, torch.optim.AdamW, lr=0.01, weight_decay=0.1)


if __name__ == "__main__":
    callback = LearnablesCallback(watch=2, to="run", budget=None)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.TensorDataset(torch.randn(96, 8))
    trainer.fit(Model(), torch.utils.data.DataLoader(data, batch_size=8))
    if trainer.global_rank == 0:
        looks = Run(callback.watcher.path).observations
        print("looked at", [look.step for look in looks], {look.stage for look in looks})
    leave()
