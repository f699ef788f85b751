"""An early-stopping helper loads the best state back after every step."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'old state loaded back in every iteration'
SOURCE = ''
PARAMETERS = ['fc.weight', 'fc.bias']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = 'not measured'
GUILTY = 'load_state_dict(best)'


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
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    best = {k: v.clone() for k, v in model.state_dict().items()}

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        if not fixed:
            model.load_state_dict(best)
        return loss
    return model, opt, step


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    before = model.fc.weight.detach().clone()
    step(), step(), step()
    moved = float((model.fc.weight.detach() - before).abs().max())
    return moved == 0, f"max |change| after 3 steps: {moved:.2e}"
