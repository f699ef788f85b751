"""The batch normalisation subtracts the bias of the convolution again."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'convolution bias cancelled by the normalisation'
SOURCE = ''
PARAMETERS = ['conv.bias']
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
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.Identity() if fixed else nn.BatchNorm1d(4)
        self.fc = nn.Linear(16, 1)

    def forward(self, x):
        return self.fc(torch.tanh(self.norm(self.conv(x[:, None]))).flatten(1))


def _make(fixed):
    torch.manual_seed(0)
    model = Net(fixed)
    return _train(model, torch.optim.Adam(model.parameters(), lr=0.01), *_batch())


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    x, _ = _batch()
    with torch.no_grad():
        a = model(x)
        model.conv.bias += 1
        b = model(x)
    gap = float((a - b).abs().max())
    step()
    return gap < 1e-4, f"output change when the bias moves by 1: {gap:.1e}"
