"""sqrt((v*v).sum()) has derivative 0/0 at v = 0; torch.linalg.vector_norm defines it as 0."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'hand-written norm of a zero-initialised parameter'
SOURCE = 'pytorch/pytorch#2421; mpariente/pytorch_stoi#7'
PARAMETERS = ['v']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = "measured: article's three prints, torchtest, detect_anomaly"
GUILTY = '.sqrt()'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.v = nn.Parameter(torch.zeros(4))
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        n = torch.linalg.vector_norm(self.v) if self.fixed else self.v.square().sum().sqrt()
        return self.fc(x * (1 + self.v) / (1 + n))


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
    step()
    bad = int((~torch.isfinite(model.v.grad)).sum())
    return bad > 0, f"non-finite gradient entries after the first step: {bad}"
