"""A small convolutional network under torch.compile."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.mix = nn.Conv2d(dim, dim, 1)
        self.gamma = nn.Parameter(1e-2 * torch.ones(dim, 1, 1))

    def forward(self, x):
        return x + self.gamma * F.gelu(self.mix(self.norm(self.conv(x))))


class Net(nn.Module):
    def __init__(self, dim=8, depth=2):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, stride=4)
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(depth)))
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(x.mean(dim=(-2, -1)))


torch.manual_seed(0)
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
compiled_model = torch.compile(model, backend="aot_eager")

for step in range(6):
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(0, 5, (8,))
    optimizer.zero_grad()
    loss = F.cross_entropy(compiled_model(images), labels)
    loss.backward()
    optimizer.step()
    print(step, f"{loss.item():.4f}")
