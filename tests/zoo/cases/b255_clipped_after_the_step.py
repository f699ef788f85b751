"""Clipping after the step limits gradients that were used already."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'clipping after the step'
SOURCE = 'VGraphRNN/VGRNN#4'
PARAMETERS = ['fc.weight', 'fc.bias']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = 'not measured'
GUILTY = 'clip_grad_norm_'


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
        loss = 10 * F.mse_loss(model(x), y)
        loss.backward()
        if fixed:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
        if not fixed:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss
    return model, opt, step


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    used = []
    opt.register_step_pre_hook(lambda *_: used.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
    step(), step()
    return max(used) > 0.11, f"gradient norm at each step: {[round(float(n), 3) for n in used]} (limit 0.1)"
