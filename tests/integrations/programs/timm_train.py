"""The heart of timm's train.py: create_optimizer_v2, a scheduler, mixup, NativeScaler, ModelEmaV3."""

import torch
from timm import create_model, utils
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

utils.random_seed(42, 0)
model = create_model(
    "vit_tiny_patch16_224",
    img_size=32,
    patch_size=8,
    depth=3,
    embed_dim=48,
    num_heads=3,
    num_classes=10,
    reg_tokens=2,
    init_values=1e-4,
    drop_path_rate=0.1,
)
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
model_ema = utils.ModelEmaV3(model, decay=0.99)
mixup_fn = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
train_loss_fn = SoftTargetCrossEntropy()
images, labels = torch.randn(256, 3, 32, 32), torch.randint(0, 10, (256,))
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(images, labels), batch_size=32, shuffle=True, drop_last=True
)
num_epochs, updates_per_epoch = 2, len(loader)
lr_scheduler, num_epochs = create_scheduler_v2(
    optimizer,
    sched="cosine",
    num_epochs=num_epochs,
    warmup_epochs=1,
    warmup_lr=1e-5,
    updates_per_epoch=updates_per_epoch,
    step_on_epochs=False,
)
lr_scheduler.step_update(0)


def train_one_epoch(epoch):
    losses_m = utils.AverageMeter()
    model.train()
    num_updates = epoch * updates_per_epoch
    for input, target in loader:
        input, target = mixup_fn(input, target)
        output = model(input)
        loss = train_loss_fn(output, target)
        losses_m.update(loss.item(), input.size(0))
        optimizer.zero_grad()
        loss.backward()
        utils.dispatch_clip_grad(model.parameters(), value=1.0, mode="norm")
        optimizer.step()
        num_updates += 1
        model_ema.update(model, step=num_updates)
        lr_scheduler.step_update(num_updates=num_updates, metric=losses_m.avg)
    return losses_m.avg


for epoch in range(num_epochs):
    print("Train:", epoch, train_one_epoch(epoch))
    lr_scheduler.step(epoch + 1)
