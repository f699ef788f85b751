"""The logit scale is clamped in place after each step, as CLIP does."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'temperature kept below a limit'
SOURCE = ''
PARAMETERS = ['log_scale']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        left, right = F.normalize(self.a(x), dim=1), F.normalize(self.b(x.flip(1)), dim=1)
        return left @ right.t() * self.log_scale.exp()


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)

    def step():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(32))
        loss.backward()
        opt.step()
        model.log_scale.data.clamp_(max=4.6)
        return loss
    return model, opt, step
