"""LBFGS clears and recomputes the gradient many times inside one step."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'LBFGS with a closure'
SOURCE = ''
PARAMETERS = ['fc.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(x)


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def step():
        def closure():
            opt.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss
        return opt.step(closure)
    return model, opt, step
