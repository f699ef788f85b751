"""One parameter whose gradient is always inf (a custom op outside the fp16 range) makes the scaler
skip the whole optimizer step each time; the finite loss gives no hint."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'GradScaler skips every step'
SOURCE = 'ymcui/Chinese-LLaMA-Alpaca#534'
PARAMETERS = ['gain', 'fc.weight']
STAGE = 'amp'
REVEALED_BY = '3 steps (scale falls, nothing moves)'
CAUGHT_BY = "measured: article's three prints, torchtest, detect_anomaly"
GUILTY = '.sqrt()'


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


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.gain = nn.Parameter(torch.zeros(()))
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        g = F.softplus(self.gain) if self.fixed else self.gain.abs().sqrt()
        return self.fc(x) + g


def _make(fixed):
    torch.manual_seed(0)
    model, (x, y) = Net(fixed), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    _EXTRAS["scaler"] = scaler

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        return loss
    return model, opt, step


_EXTRAS = {}


def extras():
    return _EXTRAS


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    moved = _moved(make)
    scale = extras()["scaler"].get_scale()
    return max(moved.values()) == 0.0, f"max |change| {max(moved.values()):.2e}, loss scale after 3 steps {scale:g}"
