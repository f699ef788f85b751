"""A running average of the model is updated after each step."""
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'stochastic weight averaging'
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
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        average.update_parameters(model)
        return loss
    return model, opt, step
