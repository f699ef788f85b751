"""What is missing from the first optimizer is in the second."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'two optimizers share the work'
SOURCE = ''
PARAMETERS = ['head.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.body.parameters(), lr=0.05)
    other = torch.optim.Adam(model.head.parameters())

    def step():
        opt.zero_grad(), other.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step(), other.step()
        return loss
    return model, opt, step
