"""backward() of a hand-written op forgets the weight gradient. The weight is reachable in the graph
and its .grad stays None."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'custom autograd.Function returns None for the weight'
SOURCE = 'pytorch/pytorch#45405'
PARAMETERS = ['weight']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = "measured: article's three prints, torcheck, torchtest"
GUILTY = 'Scale.apply'


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


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, fixed):
        ctx.save_for_backward(x, w)
        ctx.fixed = fixed
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0) if ctx.fixed else None, None


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.weight = nn.Parameter(torch.full((4,), 0.5))
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(Scale.apply(x, self.weight, self.fixed))


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
    """(bug present, evidence): does the culpable tensor move in 3 steps?"""
    moved = _moved(make)
    return max(moved.values()) == 0.0, "max |change| after 3 steps: " + ", ".join(f"{k}={v:.2e}" for k, v in moved.items())
