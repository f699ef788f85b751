"""The optimizer is rebuilt after unfreezing, the scheduler still belongs to the first one."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'scheduler of an optimizer that no longer steps'
SOURCE = ''
PARAMETERS = ['fc.weight', 'fc.bias']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = 'not measured'
GUILTY = 'sched.step()'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(x)


def _make(fixed):
    torch.manual_seed(0)
    model, (x, y) = Net(fixed), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sched = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    if not fixed:
        opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        sched.step()
        return loss
    return model, opt, step


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    before = opt.param_groups[0]["lr"]
    step(), step()
    after = opt.param_groups[0]["lr"]
    return before == after, f"learning rate {before} -> {after}"
