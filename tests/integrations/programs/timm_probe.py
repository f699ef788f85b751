"""A linear probe on a frozen timm backbone: features without a head, one linear layer on top."""

import timm
import torch
from torch import nn

torch.manual_seed(0)


class LinearProbe(nn.Module):
    def __init__(self, backbone, num_classes):
        super().__init__()
        self.backbone = backbone
        for param in self.backbone.parameters():
            param.requires_grad = False
        self.norm = nn.BatchNorm1d(backbone.num_features, affine=False)
        self.head = nn.Linear(backbone.num_features, num_classes)

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x):
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(self.norm(features))


backbone = timm.create_model("resnet18", num_classes=0, pretrained=False)
model = LinearProbe(backbone, 4)
optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.0)
criterion = nn.CrossEntropyLoss()
x, y = torch.randn(96, 3, 32, 32), torch.randint(0, 4, (96,))
model.train()
for epoch in range(2):
    for i in range(0, 96, 16):
        optimizer.zero_grad(set_to_none=True)
        loss = criterion(model(x[i : i + 16]), y[i : i + 16])
        loss.backward()
        optimizer.step()
    print(epoch, loss.item())
