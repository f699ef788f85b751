"""head.weight.data = emb.weight.data makes two Parameters over one memory: two gradients, two Adam states, one value."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'tie by sharing .data'
SOURCE = ''
PARAMETERS = ['emb.weight', 'head.weight']
STAGE = 'static'
REVEALED_BY = 'static'
CAUGHT_BY = 'not measured'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class LM(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.emb, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        if fixed:
            self.head.weight = self.emb.weight
        else:
            self.head.weight.data = self.emb.weight.data

    def forward(self, ids):
        return self.head(self.emb(ids))


def _make(fixed):
    torch.manual_seed(0)
    model, ids = LM(fixed), torch.arange(32) % 6
    opt = torch.optim.Adam(model.parameters(), lr=0.01)

    def step():
        opt.zero_grad()
        loss = F.cross_entropy(model(ids), (ids * 5 + 1) % 6)
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
    step()
    a, b = model.emb.weight, model.head.weight
    return a is not b and a.data_ptr() == b.data_ptr(), f"one object: {a is b}, one memory: {a.data_ptr() == b.data_ptr()}"
