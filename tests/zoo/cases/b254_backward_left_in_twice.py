"""A second backward on the same loss, left over from debugging, doubles the gradient."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'backward called twice on one loss'
SOURCE = ''
PARAMETERS = ['fc.weight', 'fc.bias']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = 'not measured'
GUILTY = 'loss.backward()'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(x)


def _make(fixed):
    torch.manual_seed(0)
    model, (x, y) = Net(fixed), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward(retain_graph=True)
        if not fixed:
            loss.backward()
        opt.step()
        return loss
    return model, opt, step


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    x, y = _batch()
    true = torch.autograd.grad(F.mse_loss(model(x), y), model.fc.weight)[0]
    step()
    ratio = float(model.fc.weight.grad.norm() / true.norm())
    return ratio > 1.5, f"|gradient used| / |true gradient| = {ratio:.2f}"
