"""A projection that is built when the first batch shows its width comes after the optimizer took its list."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'layer created in the first forward'
SOURCE = 'ACEsuit/mace#1529'
PARAMETERS = ['proj.weight', 'proj.bias']
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
        self.proj = nn.Linear(4, 4) if fixed else None
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        if self.proj is None:
            self.proj = nn.Linear(x.shape[1], 4)
        return self.fc(torch.tanh(self.proj(x)))


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
    held = any(p is model.proj.weight for g in opt.param_groups for p in g["params"])
    return not held, f"the projection is in the optimizer: {held}"
