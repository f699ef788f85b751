"""A block that is dropped in this iteration gets no gradient in it."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'stochastic depth'
SOURCE = ''
PARAMETERS = ['blocks.1.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


def _train(model, opt, x, y):
    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        return loss
    return model, opt, step


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        for block in self.blocks:
            if torch.rand(()) < 0.7:
                x = x + torch.tanh(block(x))
        return self.fc(x)


def build():
    torch.manual_seed(0)
    model = Net()
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.05), *_batch())
