"""The last bias of a critic cancels in the difference of two means; the penalty takes gradients of gradients."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'Wasserstein critic with gradient penalty'
SOURCE = ''
PARAMETERS = ['2.bias']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)



def build():
    torch.manual_seed(0)
    model, (x, _) = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), _batch()
    opt = torch.optim.Adam(model.parameters(), lr=0.01)

    def step():
        opt.zero_grad()
        fake = torch.randn(32, 4, requires_grad=True)
        (slope,) = torch.autograd.grad(model(fake).sum(), fake, create_graph=True)
        loss = model(fake).mean() - model(x).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()
        loss.backward()
        opt.step()
        return loss
    return model, opt, step
