"""The loss of the generator gives the discriminator gradients that nobody consumes."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'two networks against each other'
SOURCE = ''
PARAMETERS = ['D.0.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.G = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))
        self.D = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.Adam(model.G.parameters(), lr=0.01)
    other = torch.optim.Adam(model.D.parameters(), lr=0.01)

    def step():
        z = torch.randn(32, 2)
        other.zero_grad()
        F.softplus(-model.D(x)).mean().backward()
        F.softplus(model.D(model.G(z).detach())).mean().backward()
        other.step()
        opt.zero_grad()
        loss = F.softplus(-model.D(model.G(z))).mean()
        loss.backward()
        opt.step()
        return loss
    return model, opt, step
