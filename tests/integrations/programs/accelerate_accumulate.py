"""Gradient accumulation and clipping the way Accelerate's guide shows it."""

import torch
from accelerate import Accelerator
from torch import nn

torch.manual_seed(0)


class PromptedEncoder(nn.Module):
    def __init__(self, dim=32, prompts=4, classes=5):
        super().__init__()
        self.embed = nn.Embedding(60, dim)
        self.prompts = nn.Parameter(torch.randn(1, prompts, dim) * 0.02)
        self.encoder = nn.TransformerEncoderLayer(dim, 4, 64, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, ids):
        x = torch.cat([self.prompts.expand(len(ids), -1, -1), self.embed(ids)], dim=1)
        return self.head(self.norm(self.encoder(x)).mean(dim=1))


ids = torch.randint(0, 60, (320, 10))
training_dataloader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(ids, ids[:, 0] % 5), batch_size=16, shuffle=True
)
loss_function = nn.CrossEntropyLoss()

accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
model = PromptedEncoder()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
model, optimizer, training_dataloader, scheduler = accelerator.prepare(
    model, optimizer, training_dataloader, scheduler
)
model.train()
for epoch in range(2):
    for batch in training_dataloader:
        with accelerator.accumulate(model):
            inputs, targets = batch
            outputs = model(inputs)
            loss = loss_function(outputs, targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    accelerator.print(epoch, loss.item())
