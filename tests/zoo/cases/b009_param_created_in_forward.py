"""nn.Parameter(torch.randn(..)) inside forward gives fresh random values at every call; whatever was
learned is thrown away and the optimizer never saw it."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'Parameter created anew in every forward'
SOURCE = 'leaderj1001/Stand-Alone-Self-Attention#2'
PARAMETERS = ['rel']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = 'measured: torcheck, torchtest'
GUILTY = 'self.rel = nn.Parameter(torch.randn(4))'


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
        self.fc = nn.Linear(4, 1)
        self.fixed = fixed
        self.rel = nn.Parameter(torch.randn(4))

    def forward(self, x):
        if not self.fixed:
            self.rel = nn.Parameter(torch.randn(4))
        return self.fc(x + self.rel)


def _make(fixed):
    torch.manual_seed(0)
    model = Net(fixed)
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.1), *_batch())


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    step()
    ids, owned = set(), []
    for _ in range(3):
        ids.add(id(model.rel))
        owned.append(any(p is model.rel for g in opt.param_groups for p in g["params"]))
        step()
    return len(ids) > 1, f"distinct Parameter objects seen in 3 steps: {len(ids)}; in the optimizer: {owned}"
