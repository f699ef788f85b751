"""Two tasks call backward one after the other over one graph; their sum is meant."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'several tasks, several backwards'
SOURCE = ''
PARAMETERS = ['body.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.a(h), self.b(h)


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)

    def step():
        opt.zero_grad()
        a, b = model(x)
        first, second = F.mse_loss(a, y), F.l1_loss(b, y)
        first.backward(retain_graph=True)
        second.backward()
        opt.step()
        return first + second
    return model, opt, step
