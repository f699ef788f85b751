"""params = filter(...) stored once: the first clip consumes it, every later call clips nothing and
returns 0."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'gradient clipping fed an exhausted iterator'
SOURCE = 'PixArt-alpha/PixArt-alpha#160'
PARAMETERS = ['fc.weight', 'fc.bias']
STAGE = 'step'
REVEALED_BY = '2 steps (norm at step() above the limit)'
CAUGHT_BY = 'measured: none; read: torch warns for an empty generator, not for an empty filter object'
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
    to_clip = filter(lambda p: p.requires_grad, model.parameters())
    if fixed:
        to_clip = list(to_clip)

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y) * 100
        loss.backward()
        torch.nn.utils.clip_grad_norm_(to_clip, 0.1)
        opt.step()
        return loss
    return model, opt, step


def extras():
    return {"max_norm": 0.1}


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    norms = []
    for _ in range(3):
        step()
        norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
    return max(norms) > 0.11, f"gradient norm used by step() per step: {[round(n, 3) for n in norms]} (limit 0.1)"
