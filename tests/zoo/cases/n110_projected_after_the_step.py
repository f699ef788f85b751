"""A value that changes after the step is projected, not overwritten."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'projection to the sphere after the step'
SOURCE = ''
PARAMETERS = ['w']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(F.normalize(torch.randn(1, 4), dim=1))

    def forward(self, x):
        return F.linear(x, self.w)


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        model.w.data.copy_(F.normalize(model.w.data, dim=1))
        return loss
    return model, opt, step
