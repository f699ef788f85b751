"""A function built in __init__ closes over a local Parameter: it is used in every forward and registered nowhere."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'Parameter only in a closure'
SOURCE = ''
PARAMETERS = ['gate.scale']
STAGE = 'static'
REVEALED_BY = 'static'
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
        scale = nn.Parameter(torch.ones(4))
        self.gate = lambda x: x * scale
        if fixed:
            self.scale = scale
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(self.gate(x))


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
    held = {id(p) for g in opt.param_groups for p in g["params"]}
    scale = model.gate.__closure__[0].cell_contents
    step()
    return id(scale) not in held, f"in the optimizer: {id(scale) in held}, gradient arrives: {scale.grad is not None}"
