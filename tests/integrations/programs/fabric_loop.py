"""A raw training loop with Lightning Fabric, after its image_classifier example."""

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from sklearn.datasets import load_digits
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning.fabric import Fabric, seed_everything


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 1)
        self.conv2 = nn.Conv2d(16, 32, 3, 1)
        self.gain = nn.Parameter(torch.ones(32, 1, 1))
        self.dropout = nn.Dropout(0.25)
        self.fc = nn.Linear(32 * 2 * 2, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x) * self.gain)
        x = F.max_pool2d(x, 2)
        x = torch.flatten(self.dropout(x), 1)
        return F.log_softmax(self.fc(x), dim=1)


def run():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    seed_everything(1)
    digits = load_digits()
    x = torch.tensor(digits.images[:600], dtype=torch.float32).unsqueeze(1) / 16
    train_loader = DataLoader(TensorDataset(x, torch.tensor(digits.target[:600])), 32, shuffle=True)
    train_loader = fabric.setup_dataloaders(train_loader)

    model = Net()
    optimizer = optim.Adadelta(model.parameters(), lr=1.0)
    model, optimizer = fabric.setup(model, optimizer)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)

    for epoch in range(2):
        model.train()
        for batch_idx, (data, target) in enumerate(train_loader):
            optimizer.zero_grad()
            output = model(data)
            loss = F.nll_loss(output, target)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
        scheduler.step()
        print(f"Epoch {epoch}: loss {loss.item():.4f}")


if __name__ == "__main__":
    run()
