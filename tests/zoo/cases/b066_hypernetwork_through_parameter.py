"""target.weight = nn.Parameter(hyper(z)) (or .data.copy_) severs the generator; functional_call or
F.linear with the generated tensor keeps it."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'generated weights wrapped in nn.Parameter / copied into .data'
SOURCE = 'lezcano/geotorch#12'
PARAMETERS = ['hyper.weight', 'hyper.bias']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = "measured: article's three prints, torcheck, torchtest, graph walk"
GUILTY = '.data.copy_(w)'


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


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.hyper = nn.Linear(3, 4)
        self.register_buffer("z", torch.ones(3))
        self.target = nn.Linear(4, 1)

    def forward(self, x):
        w = self.hyper(self.z).view(1, 4)
        if self.fixed:
            return F.linear(x, w, self.target.bias)
        self.target.weight.data.copy_(w)
        return self.target(x)


def _make(fixed):
    torch.manual_seed(0)
    model = Net(fixed)
    if fixed:
        model.target.weight = None
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.05), *_batch())


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    """(bug present, evidence): does the culpable tensor move in 3 steps?"""
    moved = _moved(make)
    return max(moved.values()) == 0.0, "max |change| after 3 steps: " + ", ".join(f"{k}={v:.2e}" for k, v in moved.items())
