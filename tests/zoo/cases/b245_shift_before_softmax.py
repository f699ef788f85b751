"""A scalar bias on all logits is removed by the softmax again."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'shift in front of a softmax'
SOURCE = ''
PARAMETERS = ['shift']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = 'not measured'


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
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.shift = nn.Parameter(torch.zeros(1))
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        logits = 2 * x + (self.shift * x if self.fixed else self.shift)
        return self.fc(logits.softmax(-1))


def _make(fixed):
    torch.manual_seed(0)
    model = Net(fixed)
    return _train(model, torch.optim.Adam(model.parameters(), lr=0.01), *_batch())


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    x, _ = _batch()
    with torch.no_grad():
        a = model(x)
        model.shift += 1
        b = model(x)
    gap = float((a - b).abs().max())
    step()
    return gap < 1e-6, f"output change when the shift moves by 1: {gap:.1e}"
