"""The forward copies the initial value back into the weight each time."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'forward rewrites its own Parameter'
SOURCE = ''
PARAMETERS = ['weight']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = 'not measured'
GUILTY = 'copy_(self.start)'


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
        self.weight = nn.Parameter(torch.ones(1, 4))
        self.register_buffer('start', torch.ones(1, 4))

    def forward(self, x):
        if not self.fixed:
            self.weight.data.copy_(self.start)
        return F.linear(x, self.weight)


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
    x, _ = _batch()
    first = model(x).detach()
    step(), step(), step()
    gap = float((model(x).detach() - first).abs().max())
    return gap == 0, f"output changed by {gap:.2e} in 3 steps"
