""".weight of a parametrized layer is a new tensor at each access; the originals train."""
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'weight norm, spectral norm and orthogonal weights'
SOURCE = ''
PARAMETERS = ['0.weight']      # look suspicious, are fine
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



def build():
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Tanh(), spectral_norm(nn.Linear(4, 4)), nn.Tanh(), orthogonal(nn.Linear(4, 4)), nn.Linear(4, 1))
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.05), *_batch())
