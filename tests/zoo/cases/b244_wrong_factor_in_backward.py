"""d(w²)/dw is 2w; the hand-written backward forgets the 2."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'custom Function forgets a factor'
SOURCE = ''
PARAMETERS = ['weight']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = 'not measured'
GUILTY = 'Squared.apply'


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


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, fixed):
        ctx.save_for_backward(x, w)
        ctx.fixed = fixed
        return x * w * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w * w, (2 if ctx.fixed else 1) * (g * x * w).sum(0), None


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.weight = nn.Parameter(torch.full((4,), 0.7))
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(Squared.apply(x, self.weight, self.fixed))


def _make(fixed):
    torch.manual_seed(0)
    model = Net(fixed)
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.1), *_batch())


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    x, w = torch.ones(1, 4, dtype=torch.float64), torch.full((4,), 0.7, dtype=torch.float64, requires_grad=True)
    ok = torch.autograd.gradcheck(lambda w: Squared.apply(x, w, model.fixed), (w,), raise_exception=False)
    step()
    return not ok, f"gradcheck: {ok}"
