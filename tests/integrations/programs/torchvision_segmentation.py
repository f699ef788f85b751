"""torchvision's references/segmentation/train.py: two heads, two learning rates, a polynomial schedule."""

import torch
import torchvision
from torch import nn


def criterion(inputs, target):
    losses = {}
    for name, x in inputs.items():
        losses[name] = nn.functional.cross_entropy(x, target, ignore_index=255)
    if len(losses) == 1:
        return losses["out"]
    return losses["out"] + 0.5 * losses["aux"]


torch.manual_seed(0)
model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
    weights=None, weights_backbone=None, num_classes=4
)
params_to_optimize = [
    {"params": [p for p in model.backbone.parameters() if p.requires_grad]},
    {"params": [p for p in model.classifier.parameters() if p.requires_grad], "lr": 0.1},
]
optimizer = torch.optim.SGD(params_to_optimize, lr=0.01, momentum=0.9, weight_decay=1e-4)
iters_per_epoch, epochs = 6, 1
lr_scheduler = torch.optim.lr_scheduler.PolynomialLR(
    optimizer, total_iters=iters_per_epoch * epochs, power=0.9
)
for epoch in range(epochs):
    model.train()
    for _ in range(iters_per_epoch):
        image, target = torch.randn(4, 3, 48, 48), torch.randint(0, 4, (4, 48, 48))
        target[:, :4] = 255
        output = model(image)
        loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
    print(epoch, loss.item())
