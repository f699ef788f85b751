"""The gradient of the frozen rows is masked, and AdamW decays them all the same."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'frozen rows shrink by weight decay'
SOURCE = ''
PARAMETERS = ['table.weight']
STAGE = 'step'
REVEALED_BY = '1 step'
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
        self.table, self.fc = nn.Embedding(5, 4), nn.Linear(4, 1)
        keep = torch.ones(5, 1)
        keep[:2] = 0
        self.table.weight.register_hook(lambda grad: grad * keep)

    def forward(self, x):
        return self.fc(self.table(x[:, 0].abs().mul(2).long().clamp(max=4)))


def _make(fixed):
    torch.manual_seed(0)
    model = Net(fixed)
    return _train(model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0 if fixed else 0.1), *_batch())


def extras():
    return {"frozen_rows": {"table.weight": [0, 1]}}


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    before = model.table.weight[:2].detach().clone()
    step(), step(), step()
    moved = float((model.table.weight[:2].detach() - before).abs().max())
    return moved > 0, f"frozen rows moved by {moved:.2e}"
