"""A sparse gradient goes to SparseAdam, the dense ones to another optimizer."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'sparse gradients'
SOURCE = ''
PARAMETERS = ['table.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=True)
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(self.table(x[:, 0].mul(3).long().clamp(0, 9)))


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SparseAdam(list(model.table.parameters()))
    other = torch.optim.SGD(model.fc.parameters(), lr=0.05)

    def step():
        opt.zero_grad(), other.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step(), other.step()
        return loss
    return model, opt, step
