"""The micro-batches are averaged by dividing the gradients instead of the losses."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'gradients divided before the step'
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
    opt = torch.optim.SGD(model.parameters(), lr=0.05)

    def step():
        opt.zero_grad()
        total = 0.0
        for xs, ys in zip(x.chunk(4), y.chunk(4)):
            loss = F.mse_loss(model(xs), ys)
            loss.backward()
            total = total + loss
        for p in model.parameters():
            p.grad /= 4
        opt.step()
        return total
    return model, opt, step
