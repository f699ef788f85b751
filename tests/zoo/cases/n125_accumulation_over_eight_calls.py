"""With accumulation over eight calls no step at all happens in the first few."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'accumulation longer than the observation'
SOURCE = ''
PARAMETERS = ['fc.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(x)


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    count = [0]

    def step():
        count[0] += 1
        loss = F.mse_loss(model(x), y) / 8
        loss.backward()
        if count[0] % 8 == 0:
            opt.step()
            opt.zero_grad()
        return loss
    return model, opt, step
