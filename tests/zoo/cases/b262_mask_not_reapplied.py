"""Pruned weights grow back: the mask was applied once, before training."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'mask applied once'
SOURCE = ''
PARAMETERS = ['weight']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = 'not measured'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.register_buffer('mask', torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
        self.weight = nn.Parameter(torch.randn(1, 4) * self.mask)

    def forward(self, x):
        return F.linear(x, self.weight)


def _make(fixed):
    torch.manual_seed(0)
    model, (x, y) = Net(fixed), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        if fixed:
            model.weight.data.mul_(model.mask)
        return loss
    return model, opt, step


def extras():
    return {"masks": {"weight": torch.tensor([[1.0, 0.0, 1.0, 0.0]])}}


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    step()
    outside = float((model.weight.detach() * (1 - model.mask)).abs().max())
    return outside > 0, f"largest weight outside the mask: {outside:.2e}"
