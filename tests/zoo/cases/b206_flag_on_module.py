"""module.requires_grad = False sets a new attribute on the module and freezes nothing."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'requires_grad assigned to a module'
SOURCE = ''
PARAMETERS = ['backbone.weight', 'backbone.bias']
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


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        if fixed:
            self.backbone.requires_grad_(False)
        else:
            self.backbone.requires_grad = False

    def forward(self, x):
        return self.head(torch.relu(self.backbone(x)))


def _make(fixed):
    torch.manual_seed(0)
    model = Net(fixed)
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.1), *_batch())


def extras():
    return {"frozen": ["backbone"]}


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    before = model.backbone.weight.detach().clone()
    step(), step(), step()
    moved = float((model.backbone.weight.detach() - before).abs().max())
    return moved > 0, f"the frozen backbone moved by {moved:.2e}"
