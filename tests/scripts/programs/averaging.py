"""Exponential and stochastic weight averaging with torch.optim.swa_utils."""

import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

torch.manual_seed(0)
loader = [(torch.randn(16, 10), torch.randn(16, 1)) for _ in range(5)]
model = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
model.register_parameter("scale", nn.Parameter(torch.ones(1)))
loss_fn = nn.MSELoss()
optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
ema_model = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
swa_model = AveragedModel(model)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
swa_start = 1
swa_scheduler = SWALR(optimizer, swa_lr=5e-4)

for epoch in range(3):
    for input, target in loader:
        optimizer.zero_grad()
        loss = loss_fn(model(input) * model.scale, target)
        loss.backward()
        optimizer.step()
        ema_model.update_parameters(model)
    if epoch > swa_start:
        swa_model.update_parameters(model)
        swa_scheduler.step()
    else:
        scheduler.step()
    print(epoch, f"{loss.item():.4f}")

update_bn(loader, swa_model)
