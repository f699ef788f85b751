"""backward on the plain loss, then scaler.step divides by the scale."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'scaler.step without scaler.scale'
SOURCE = ''
PARAMETERS = ['fc.weight', 'fc.bias']
STAGE = 'amp'
REVEALED_BY = '1 step'
CAUGHT_BY = 'not measured'
GUILTY = 'backward()'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(x)


def _make(fixed):
    torch.manual_seed(0)
    model, (x, y) = Net(fixed), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler("cpu")

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        scaled = scaler.scale(loss)
        (scaled if fixed else loss).backward()
        scaler.step(opt)
        scaler.update()
        return loss
    return model, opt, step


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    x, y = _batch()
    true = torch.autograd.grad(F.mse_loss(model(x), y), model.fc.weight)[0]
    before = model.fc.weight.detach().clone()
    step()
    ratio = float((model.fc.weight.detach() - before).norm() / (opt.param_groups[0]["lr"] * true.norm()))
    return not 0.5 < ratio < 2, f"|update| / (rate x |gradient|) = {ratio:.2e}"
