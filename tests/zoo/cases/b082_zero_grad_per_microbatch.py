"""Only the last micro-batch survives: the effective batch is a quarter of what the config says."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'zero_grad inside the accumulation loop'
SOURCE = 'bytetriper/RAE#67'
PARAMETERS = ['fc.weight', 'fc.bias']
STAGE = 'step'
REVEALED_BY = '1 step (compare with the big batch)'
CAUGHT_BY = 'measured: none'
GUILTY = 'opt.zero_grad()'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(x)


def _make(fixed):
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        opt.zero_grad()
        total = 0.0
        for xs, ys in zip(x.chunk(4), y.chunk(4)):
            if not fixed:
                opt.zero_grad()
            loss = F.mse_loss(model(xs), ys) / 4
            loss.backward()
            total = total + loss
        opt.step()
        return total
    return model, opt, step


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    x, y = _batch()
    true = torch.autograd.grad(F.mse_loss(model(x), y), model.fc.weight)[0]
    step()
    rel = float((model.fc.weight.grad - true).norm() / true.norm())
    return rel > 1e-3, f"relative error of the accumulated gradient against the full batch: {rel:.3f}"
