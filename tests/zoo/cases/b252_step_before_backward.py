"""The step comes before the backward, and the gradients are cleared at the top of the loop."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'step before backward'
SOURCE = ''
PARAMETERS = ['fc.weight', 'fc.bias']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = 'not measured'
GUILTY = 'opt.zero_grad()'


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
    opt = torch.optim.SGD(model.parameters(), lr=0.05)

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        if not fixed:
            opt.step()
        loss.backward()
        if fixed:
            opt.step()
        return loss
    return model, opt, step


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    before = model.fc.weight.detach().clone()
    step(), step(), step()
    moved = float((model.fc.weight.detach() - before).abs().max())
    return moved == 0, f"max |change| after 3 steps: {moved:.2e}"
