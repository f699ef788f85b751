"""An options object that is no nn.Module hides the Parameter it carries."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'Parameter on a plain Python object'
SOURCE = ''
PARAMETERS = ['options.scale']
STAGE = 'static'
REVEALED_BY = 'static'
CAUGHT_BY = 'not measured'


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


class Options:
    pass


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.options = nn.Module() if fixed else Options()
        self.options.scale = nn.Parameter(torch.ones(4))
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(x * self.options.scale)


def _make(fixed):
    torch.manual_seed(0)
    model = Net(fixed)
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.1), *_batch())


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    """(bug present, evidence): does the culpable tensor move in 3 steps?"""
    moved = _moved(make)
    return max(moved.values()) == 0.0, "max |change| after 3 steps: " + ", ".join(f"{k}={v:.2e}" for k, v in moved.items())
