"""torchvision's references/classification/train.py, cut to its training path."""

import time

import torch
import torch.utils.data
import torchvision
from torch import nn


class ExponentialMovingAverage(torch.optim.swa_utils.AveragedModel):
    def __init__(self, model, decay, device="cpu"):
        def ema_avg(avg_model_param, model_param, num_averaged):
            return decay * avg_model_param + (1 - decay) * model_param

        super().__init__(model, device, ema_avg, use_buffers=True)


def set_weight_decay(model, weight_decay, norm_weight_decay=None):
    norm_classes = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    params, norm_params = [], []

    def _add_params(module):
        for p in module.parameters(recurse=False):
            if not p.requires_grad:
                continue
            (norm_params if isinstance(module, norm_classes) else params).append(p)
        for child in module.children():
            _add_params(child)

    _add_params(model)
    return [
        {"params": params, "weight_decay": weight_decay},
        {"params": norm_params, "weight_decay": norm_weight_decay},
    ]


def train_one_epoch(
    model, criterion, optimizer, data_loader, device, epoch, model_ema=None, scaler=None
):
    model.train()
    for i, (image, target) in enumerate(data_loader):
        start_time = time.time()
        image, target = image.to(device), target.to(device)
        with torch.amp.autocast("cpu", enabled=scaler is not None):
            output = model(image)
            loss = criterion(output, target)
        optimizer.zero_grad()
        if scaler is not None:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if model_ema and i % 2 == 0:
            model_ema.update_parameters(model)
    print(f"Epoch [{epoch}] loss {loss.item():.4f} lr {optimizer.param_groups[0]['lr']:.4f}")


def evaluate(model, criterion, data_loader):
    model.eval()
    with torch.inference_mode():
        for image, target in data_loader:
            loss = criterion(model(image), target)
    print(f"Test loss {loss.item():.4f}")


def main():
    torch.manual_seed(0)
    dataset = torch.utils.data.TensorDataset(
        torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    )
    data_loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)
    model = torchvision.models.get_model("mobilenet_v3_small", weights=None, num_classes=10)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    parameters = set_weight_decay(model, 1e-4, norm_weight_decay=0.0)
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    main_lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    warmup_lr_scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=0.1, total_iters=1
    )
    lr_scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer, schedulers=[warmup_lr_scheduler, main_lr_scheduler], milestones=[1]
    )
    model_ema = ExponentialMovingAverage(model, decay=0.99)
    for epoch in range(2):
        train_one_epoch(model, criterion, optimizer, data_loader, "cpu", epoch, model_ema)
        lr_scheduler.step()
        evaluate(model, criterion, data_loader)
        evaluate(model_ema, criterion, data_loader)


if __name__ == "__main__":
    main()
