"""A fixed network in evaluation mode measures the loss; it asks for gradients and nobody trains it."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'loss measured by a network in evaluation mode'
SOURCE = ''
PARAMETERS = ['judge.0.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x)


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    judge = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()

    def step():
        opt.zero_grad()
        loss = (judge(model(x)) - judge(x)).square().mean()
        loss.backward()
        opt.step()
        return loss
    return model, opt, step
