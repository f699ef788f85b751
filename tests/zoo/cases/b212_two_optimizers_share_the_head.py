"""The head is in the optimizer of the model and in one of its own: it is stepped twice."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'a parameter in two optimizers'
SOURCE = ''
PARAMETERS = ['head.weight', 'head.bias']
STAGE = 'static'
REVEALED_BY = 'static'
CAUGHT_BY = 'not measured'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


_EXTRAS = {}


def extras():
    return _EXTRAS


def _make(fixed):
    torch.manual_seed(0)
    model, (x, y) = Net(fixed), _batch()
    opt = torch.optim.SGD(model.body.parameters() if fixed else model.parameters(), lr=0.05)
    fast = torch.optim.SGD(model.head.parameters(), lr=0.2)
    _EXTRAS["optimizers"] = [opt, fast]

    def step():
        opt.zero_grad(), fast.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step(), fast.step()
        return loss
    return model, opt, step


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    n = sum(p is model.head.weight for o in _EXTRAS["optimizers"] for g in o.param_groups for p in g["params"])
    step()
    return n > 1, f"optimizers that hold the head: {n}"
