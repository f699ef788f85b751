"""parametrize.cached() is meant for one forward. Left open around the loop, layer.weight stays the
tensor computed at the first call."""
import contextlib
from torch.nn.utils import parametrize
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'training loop inside parametrize.cached()'
SOURCE = ''
PARAMETERS = ['fc.parametrizations.weight.original']
STAGE = 'step'
REVEALED_BY = '2 steps (parameter moves, output does not follow)'
CAUGHT_BY = 'measured: none'
GUILTY = 'return self.fc(x)'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Mirror(nn.Module):
    def forward(self, w):
        return torch.cat([w[:, :2], w[:, :2].flip(1)], dim=1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)
        parametrize.register_parametrization(self.fc, "weight", Mirror())

    def forward(self, x):
        return self.fc(x)


def _make(fixed):
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    cache = contextlib.ExitStack()
    if not fixed:
        cache.enter_context(parametrize.cached())
    _OPEN.append(cache)

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        return loss
    return model, opt, step


_OPEN = []


def extras():
    """'close' leaves the cache context again."""
    return {"close": lambda: [s.close() for s in _OPEN] and _OPEN.clear()}


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    start = model.fc.parametrizations.weight.original.detach().clone()
    used = model.fc.weight.detach().clone()
    for _ in range(3):
        step()
    moved = float((model.fc.parametrizations.weight.original.detach() - start).abs().max())
    follows = float((model.fc.weight.detach() - used).abs().max())
    extras()["close"]()
    return moved > 0 and follows == 0, f"original moved by {moved:.2e}, the weight used in forward by {follows:.2e}"
