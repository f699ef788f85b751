"""self.scale = self.log_scale.exp() (no re-evaluation) or a cache that is never invalidated. The
Parameter receives gradients and is updated, but forward keeps using the first value."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'value derived from a Parameter cached at construction'
SOURCE = 'optiland/optiland#794'
PARAMETERS = ['log_scale']
STAGE = 'step'
REVEALED_BY = '2 steps (parameter moves, output does not follow)'
CAUGHT_BY = 'measured: none'
GUILTY = 'return self.fc(x * (1 + scale))'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.log_scale = nn.Parameter(torch.zeros(4))
        self._scale = torch.cat([self.log_scale[:2], self.log_scale[2:]])     # once, for speed
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        scale = torch.cat([self.log_scale[:2], self.log_scale[2:]]) if self.fixed else self._scale
        return self.fc(x * (1 + scale))


def _make(fixed):
    torch.manual_seed(0)
    model, (x, y) = Net(fixed), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        if norm.isfinite():                       # the usual guard hides the NaN for ever
            opt.step()
        return loss
    return model, opt, step


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    for _ in range(3):
        step()
    moved = float(model.log_scale.detach().abs().max())
    x = torch.ones(1, 4)
    with torch.no_grad():
        a = model(x)
        model.log_scale += 5.0
        b = model(x)
    return moved > 0 and torch.equal(a, b), f"parameter moved by {moved:.2e}; output after adding 5 to it changed by {float((a - b).abs().max()):.2e}"
