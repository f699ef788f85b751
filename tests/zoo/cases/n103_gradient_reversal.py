"""The forward is the identity and the backward turns the sign: meant, in domain-adversarial training."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'gradient reversal layer'
SOURCE = ''
PARAMETERS = ['body.weight']      # look suspicious, are fine
STAGE = 'negative'


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


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -0.5 * g


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.domain = nn.Linear(4, 4), nn.Linear(4, 1)
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.fc(h) + self.domain(Reverse.apply(h))


def build():
    torch.manual_seed(0)
    model = Net()
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.05), *_batch())
