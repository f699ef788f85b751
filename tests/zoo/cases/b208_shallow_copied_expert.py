"""copy.copy(module) shares the registry of Parameters: the two experts are one."""
import copy
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'experts made by a shallow copy'
SOURCE = ''
PARAMETERS = ['experts.1.weight']
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
        first = nn.Linear(4, 4)
        self.experts = nn.ModuleList([first, nn.Linear(4, 4) if fixed else copy.copy(first)])
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(self.experts[0](x).tanh() + self.experts[1](-2 * x).tanh())


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
    step(), step(), step()
    same = model.experts[0].weight is model.experts[1].weight
    return same, f"one Parameter for both experts: {same}"
