"""The criterion has Parameters of its own, and the optimizer was given those of the model only."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'parameters of the criterion are in no optimizer'
SOURCE = 'KaiyangZhou/pytorch-center-loss#22'
PARAMETERS = ['centers']
STAGE = 'static'
REVEALED_BY = 'static'
CAUGHT_BY = 'not measured'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Centers(nn.Module):
    def __init__(self):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(2))

    def forward(self, z):
        return (z - self.centers).square().mean()


_EXTRAS = {}


def extras():
    return _EXTRAS


def _make(fixed):
    torch.manual_seed(0)
    model, criterion, (x, _) = nn.Linear(4, 2), Centers(), _batch()
    params = [*model.parameters(), *criterion.parameters()] if fixed else model.parameters()
    opt = torch.optim.SGD(params, lr=0.1)
    _EXTRAS["modules"] = {"criterion": criterion}

    def step():
        opt.zero_grad()
        loss = criterion(model(x))
        loss.backward()
        opt.step()
        return loss
    return model, opt, step


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    centers = _EXTRAS["modules"]["criterion"].centers
    before = centers.detach().clone()
    step(), step(), step()
    moved = float((centers.detach() - before).abs().max())
    return moved == 0, f"the centres moved by {moved:.2e}"
