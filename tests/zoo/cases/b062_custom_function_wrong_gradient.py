"""A sign, a missing term or a missing 1/n in a hand-written backward. The parameter moves every step,
in a wrong direction."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'custom autograd.Function with a wrong weight gradient'
SOURCE = 'pytorch/pytorch#4355'
PARAMETERS = ['weight']
STAGE = 'step'
REVEALED_BY = 'probe (gradcheck / finite difference)'
CAUGHT_BY = 'measured: none; read: torch.autograd.gradcheck, if someone runs it'
GUILTY = 'Sharpen.apply'


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


class Sharpen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, fixed):
        ctx.save_for_backward(x, w)
        ctx.fixed = fixed
        return x * (1 - w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        sign = -1.0 if ctx.fixed else 1.0
        return g * (1 - w), sign * (g * x).sum(0), None


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.weight = nn.Parameter(torch.full((4,), 0.5))
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(Sharpen.apply(x, self.weight, self.fixed))


def _make(fixed):
    torch.manual_seed(0)
    model = Net(fixed)
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.02), *_batch())


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    x, y = _batch()
    step()
    model.zero_grad()
    F.mse_loss(model(x), y).backward()
    with torch.no_grad():
        h, w = 1e-3, model.weight
        w[0] += h
        up = F.mse_loss(model(x), y)
        w[0] -= 2 * h
        down = F.mse_loss(model(x), y)
        w[0] += h
    num, ana = float(up - down) / (2 * h), float(model.weight.grad[0])
    return abs(num - ana) > 0.02 * abs(num) + 1e-4, f"analytic {ana:.4f}, numeric {num:.4f}"
