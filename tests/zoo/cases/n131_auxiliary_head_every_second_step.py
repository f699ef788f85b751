"""An auxiliary head takes part in every second iteration only."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'a head used now and then'
SOURCE = ''
PARAMETERS = ['aux.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.aux = nn.Linear(4, 1), nn.Linear(4, 1)


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    count = [0]

    def step():
        count[0] += 1
        opt.zero_grad()
        loss = F.mse_loss(model.fc(x), y)
        if count[0] % 2 == 0:
            loss = loss + F.mse_loss(model.aux(x), y)
        loss.backward()
        opt.step()
        return loss
    return model, opt, step
