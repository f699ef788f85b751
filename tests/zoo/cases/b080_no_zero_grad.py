"""Every step applies the running sum of all gradients so far."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'gradients never cleared'
SOURCE = 'pytorch/examples#1424'
PARAMETERS = ['fc.weight', 'fc.bias']
STAGE = 'step'
REVEALED_BY = '2 steps (same batch, gradient doubles)'
CAUGHT_BY = "measured: none; read: torch-preflight TG003 on a plain loop (run), not on this closure; TrainCheck infers 'zero_grad clears .grad' from a reference run"
GUILTY = 'opt.step()'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(x)


def _make(fixed):
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        if fixed:
            opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        return loss
    return model, opt, step


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    x, y = _batch()
    for _ in range(3):
        w = [p.detach().clone() for p in model.parameters()]
        step()
    used = model.fc.weight.grad.detach().clone()
    with torch.no_grad():
        for p, v in zip(model.parameters(), w):
            p.copy_(v)
    true = torch.autograd.grad(F.mse_loss(model(x), y), model.fc.weight)[0]
    ratio = float(used.norm() / true.norm())
    return ratio > 1.5, f"|gradient applied at step 3| / |true gradient| = {ratio:.2f}"
