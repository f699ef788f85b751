"""Orthogonalising an identity-initialised matrix as U @ V^T inside the graph divides by differences of
equal singular values: NaN in one step. A loop that skips non-finite gradients then never trains
anything."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'gradient through SVD with equal singular values'
SOURCE = 'pytorch/pytorch#49886'
PARAMETERS = ['rot']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = "measured: article's three prints, torchtest, detect_anomaly"
GUILTY = 'torch.linalg.svd(self.rot)'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.rot = nn.Parameter(torch.zeros(4, 4) if fixed else torch.eye(4))
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        if self.fixed:
            q = torch.matrix_exp(self.rot - self.rot.t())
        else:
            u, _, vh = torch.linalg.svd(self.rot)
            q = u @ vh
        return self.fc(x @ q)


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
    bad = int((~torch.isfinite(model.rot.grad)).sum())
    return bad > 0, f"non-finite gradient entries after the first step: {bad} of {model.rot.numel()}"
