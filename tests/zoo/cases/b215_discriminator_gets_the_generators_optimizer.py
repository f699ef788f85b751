"""A copied line gives the optimizer of the discriminator the parameters of the generator."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'two networks, one of them in both optimizers'
SOURCE = ''
PARAMETERS = ['D.0.weight', 'D.2.weight']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = 'not measured'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


def _get(root, path):
    """Follow 'blocks.0.scale' through attributes, list items and dict keys."""
    for key in path.split("."):
        if isinstance(root, dict):
            root = root[key]
        elif isinstance(root, (list, tuple)):
            root = root[int(key)]
        else:
            root = getattr(root, key)
    return root


def _moved(make, n=3):
    """Largest |change| of each culpable tensor over n steps."""
    model, opt, step = make()
    before = {p: _get(model, p).detach().clone() for p in PARAMETERS}
    for _ in range(n):
        step()
    return {p: float((_get(model, p).detach() - b).abs().max()) for p, b in before.items()}


class GAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.G = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))
        self.D = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def _make(fixed):
    torch.manual_seed(0)
    model, (x, _) = GAN(), _batch()
    opt_g = torch.optim.SGD(model.G.parameters(), lr=0.05)
    opt_d = torch.optim.SGD((model.D if fixed else model.G).parameters(), lr=0.05)

    def step():
        z = torch.randn(32, 2)
        opt_d.zero_grad()
        loss_d = F.softplus(-model.D(x)).mean() + F.softplus(model.D(model.G(z).detach())).mean()
        loss_d.backward()
        opt_d.step()
        opt_g.zero_grad()
        loss_g = F.softplus(-model.D(model.G(z))).mean()
        loss_g.backward()
        opt_g.step()
        return loss_d + loss_g
    return model, opt_g, step


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    """(bug present, evidence): does the culpable tensor move in 3 steps?"""
    moved = _moved(make)
    return max(moved.values()) == 0.0, "max |change| after 3 steps: " + ", ".join(f"{k}={v:.2e}" for k, v in moved.items())
