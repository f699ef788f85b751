"""Four micro-batches summed as if each were the whole batch: four times the learning rate, hidden by
Adam and blamed on the schedule."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'accumulated loss not divided by the number of micro-batches'
SOURCE = 'karpathy/nanoGPT#206'
PARAMETERS = ['fc.weight', 'fc.bias']
STAGE = 'step'
REVEALED_BY = '1 step (compare with the big batch)'
CAUGHT_BY = 'measured: none; read: torch-preflight TG014 on a plain loop (run), not on this closure'
GUILTY = 'loss.backward()'


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
    opt = torch.optim.SGD(model.parameters(), lr=0.05)

    def step():
        opt.zero_grad()
        total = 0.0
        for xs, ys in zip(x.chunk(4), y.chunk(4)):
            loss = F.mse_loss(model(xs), ys)
            if fixed:
                loss = loss / 4
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
    ratio = float(model.fc.weight.grad.norm() / true.norm())
    return ratio > 1.5, f"|accumulated gradient| / |full-batch gradient| = {ratio:.2f}"
