"""Lightning with gradient accumulation, bf16 mixed precision and a schedule by epoch."""

import torch
from torch import nn, optim, utils

import lightning as L

encoder = nn.Sequential(nn.Linear(8 * 8, 64), nn.ReLU(), nn.Linear(64, 3))
decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 8 * 8))


class LitAutoEncoder(L.LightningModule):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.scale = nn.Parameter(torch.ones(3))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x = x.view(x.size(0), -1)
        z = self.encoder(x) * self.scale
        x_hat = self.decoder(z)
        loss = nn.functional.mse_loss(x_hat, x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = optim.Adam(self.parameters(), lr=1e-3)
        return [optimizer], [optim.lr_scheduler.StepLR(optimizer, 1)]


autoencoder = LitAutoEncoder(encoder, decoder)
torch.manual_seed(0)
dataset = utils.data.TensorDataset(torch.rand(512, 1, 8, 8), torch.zeros(512))
train_loader = utils.data.DataLoader(dataset, batch_size=32)
trainer = L.Trainer(
    max_epochs=2,
    accumulate_grad_batches=2,
    precision="bf16-mixed",
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model=autoencoder, train_dataloaders=train_loader)
autoencoder.eval()
with torch.no_grad():
    embeddings = autoencoder.encoder(torch.rand(4, 8 * 8))
print("⚡" * 20, "\nPredictions (4 image embeddings):\n", embeddings, "\n", "⚡" * 20)
