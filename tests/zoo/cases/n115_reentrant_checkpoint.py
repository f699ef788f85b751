"""Re-entrant checkpointing runs the block without gradients first and again inside backward."""
from torch.utils.checkpoint import checkpoint
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 're-entrant activation checkpointing'
SOURCE = ''
PARAMETERS = ['body.0.weight']      # look suspicious, are fine
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


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(checkpoint(self.body, self.stem(x), use_reentrant=True))


def build():
    torch.manual_seed(0)
    model = Net()
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.05), *_batch())
