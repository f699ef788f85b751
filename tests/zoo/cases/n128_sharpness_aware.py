"""The weights are moved up the gradient and back again before the step."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'sharpness-aware minimisation'
SOURCE = ''
PARAMETERS = ['fc.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.fc = nn.Linear(8, 1)

    def forward(self, x):
        return self.fc(torch.tanh(self.body(x)))


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)

    def step():
        F.mse_loss(model(x), y).backward()
        up = [0.05 * p.grad / (p.grad.norm() + 1e-12) for p in model.parameters()]
        for p, e in zip(model.parameters(), up):
            p.data.add_(e)
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        for p, e in zip(model.parameters(), up):
            p.data.sub_(e)
        opt.step()
        opt.zero_grad()
        return loss
    return model, opt, step
