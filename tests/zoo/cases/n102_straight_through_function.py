"""A custom Function whose forward is constant almost everywhere gives a surrogate gradient on purpose."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'straight-through estimator as a Function'
SOURCE = ''
PARAMETERS = ['width']      # look suspicious, are fine
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


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.width = nn.Parameter(torch.rand(4) * 3)
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(x * Round.apply(self.width))


def build():
    torch.manual_seed(0)
    model = Net()
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.05), *_batch())
