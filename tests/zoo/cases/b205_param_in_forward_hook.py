"""A hook that multiplies an output by a Parameter of its own trains nothing: the Parameter lives in the closure of the hook."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'Parameter in the closure of a forward hook'
SOURCE = ''
PARAMETERS = ['scale']
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
        self.body = nn.Linear(4, 4)
        scale = nn.Parameter(torch.ones(4))
        self.body.register_forward_hook(lambda module, args, out: out * scale)
        if fixed:
            self.scale = scale
        self.kept = [] if fixed else [id(scale)]
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(self.body(x))


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
    (hook,) = model.body._forward_hooks.values()
    scale = hook.__closure__[0].cell_contents
    held = any(p is scale for g in opt.param_groups for p in g["params"])
    return not held, f"in the optimizer: {held}"
