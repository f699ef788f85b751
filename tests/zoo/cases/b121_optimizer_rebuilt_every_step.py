"""A new Adam each iteration (or epoch) forgets both moments and restarts bias correction: every first
step moves each entry by exactly lr, whatever its gradient."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'the optimizer is built inside the loop'
SOURCE = 'alan-turing-institute/deepsensor#47'
PARAMETERS = ['fc.weight', 'fc.bias']
STAGE = 'step'
REVEALED_BY = '2 steps (state restarts)'
CAUGHT_BY = 'measured: none'
GUILTY = 'torch.optim.Adam('


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(x)


def _make(fixed):
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    _EXTRAS["optimizers"] = [opt]

    def step():
        nonlocal opt
        if not fixed:
            opt = torch.optim.Adam(model.parameters(), lr=0.01)
            _EXTRAS["optimizers"].append(opt)
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        return loss
    return model, opt, step


_EXTRAS = {}


def extras():
    return _EXTRAS


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    for _ in range(2):
        step()
    now = _EXTRAS["optimizers"][-1]
    count = int(now.state[model.fc.weight]["step"])
    return count != 2, f"step count of the optimizer that made the second step: {count}; optimizers built: {'many' if count == 1 else 'one'}"
