"""self.weight = nn.Parameter(F.normalize(self.weight)) in forward replaces the object the optimizer
holds and cuts the graph to the old one."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'forward re-wraps its own parameter after normalising it'
SOURCE = 'google/flax#5576'
PARAMETERS = ['weight']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = 'measured: torcheck, torchtest'
GUILTY = 'self.weight = nn.Parameter(w)'


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
        self.weight = nn.Parameter(torch.randn(1, 4))

    def forward(self, x):
        w = F.normalize(self.weight, dim=1)
        if not self.fixed:
            self.weight = nn.Parameter(w)
            w = self.weight
        return x @ w.t()


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
    before, obj = model.weight.detach().clone(), model.weight
    step(), step()
    same = model.weight is obj
    cos = float(F.cosine_similarity(before, model.weight.detach(), dim=1))
    return cos > 1 - 1e-6 and not same, f"same Parameter object after 2 more steps: {same}; direction cosine {cos:.6f} (1 = nothing learned)"
