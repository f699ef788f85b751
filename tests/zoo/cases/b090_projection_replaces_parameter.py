"""model.w = nn.Parameter(project(model.w)) after each step satisfies the constraint and disconnects
the optimizer for good."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'projection that assigns a new Parameter'
SOURCE = 'pytorch/pytorch#14467 (same cause)'
PARAMETERS = ['w']
STAGE = 'step'
REVEALED_BY = '1 step (object identity)'
CAUGHT_BY = "measured: article's three prints, torcheck, graph walk"
GUILTY = 'model.w = nn.Parameter(w)'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(F.normalize(torch.randn(1, 4), dim=1))

    def forward(self, x):
        return F.linear(x, self.w)


def _make(fixed):
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        w = F.normalize(model.w.detach(), dim=1)
        if fixed:
            model.w.data.copy_(w)
        else:
            model.w = nn.Parameter(w)
        return loss
    return model, opt, step


def extras():
    return {"constraints": {"w": "unit norm rows"}}


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    step()
    before = model.w.detach().clone()
    step(), step()
    moved = float((model.w.detach() - before).abs().max())
    held = any(p is model.w for g in opt.param_groups for p in g["params"])
    return moved < 1e-6 and not held, f"change over steps 2-3: {moved:.2e}; current Parameter in the optimizer: {held}"
