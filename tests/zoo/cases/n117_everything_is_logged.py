""".item(), float(), .detach(), .numpy() and .data for the log cut nothing that matters."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'values taken out for the log'
SOURCE = ''
PARAMETERS = ['scale']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        self.seen = x.detach().mean(0)
        return self.fc(x * self.scale)


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    log = []

    def step():
        opt.zero_grad()
        out = model(x)
        loss = F.mse_loss(out, y)
        loss.backward()
        opt.step()
        log.append((loss.item(), float(model.scale.detach().mean()), model.scale.data.norm().item(), out.detach().numpy().mean()))
        return loss
    return model, opt, step
