"""The queue of old keys is a buffer, written without gradient and read by the loss."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'memory queue in a buffer'
SOURCE = ''
PARAMETERS = ['queue']      # look suspicious, are fine
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
        self.enc = nn.Linear(4, 4)
        self.register_buffer('queue', torch.randn(8, 4))
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        z = self.enc(x)
        out = self.fc(z) + 0.01 * (z @ self.queue.clone().t()).mean(1, keepdim=True)
        with torch.no_grad():
            self.queue.copy_(torch.cat([z[:1], self.queue[:-1]]))
        return out


def build():
    torch.manual_seed(0)
    model = Net()
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.05), *_batch())
