"""Without scaler.unscale_ before clip_grad_norm_, the limit is compared with gradients that are 65536
times too large: after unscaling, the step is 65536 times too small."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'clipping the scaled gradients'
SOURCE = 'Lightning-AI/pytorch-lightning#9599'
PARAMETERS = ['fc.weight', 'fc.bias']
STAGE = 'amp'
REVEALED_BY = '1 step (applied norm far below the limit)'
CAUGHT_BY = 'measured: none'
GUILTY = 'clip_grad_norm_'


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
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    _EXTRAS["scaler"] = scaler

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        if fixed:
            scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        return loss
    return model, opt, step


_EXTRAS = {"max_norm": 1.0}


def extras():
    return _EXTRAS


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    for _ in range(3):
        step()
    moved = float((torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm())
    return moved < 1e-3, f"|weights moved| in 3 steps at lr 0.1, max_norm 1: {moved:.2e}"
