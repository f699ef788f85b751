"""w.clamp(min=0) is not in place: the weight leaves the set at every step."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'projection out of place'
SOURCE = ''
PARAMETERS = ['weight']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = 'not measured'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.weight = nn.Parameter(torch.full((1, 4), 0.01))

    def forward(self, x):
        return F.linear(x, self.weight)


def _make(fixed):
    torch.manual_seed(0)
    model, (x, y) = Net(fixed), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        with torch.no_grad():
            if fixed:
                model.weight.clamp_(min=0)
            else:
                model.weight.clamp(min=0)
        return loss
    return model, opt, step


def extras():
    return {"constraints": {"weight": "non-negative"}}


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    step(), step(), step()
    least = float(model.weight.detach().min())
    return least < 0, f"smallest weight {least:.2e}"
