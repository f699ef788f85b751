"""The code book learns from a loss of its own; the encoder gets the gradient of the decoder past the argmin."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'vector quantisation with two stop-gradients'
SOURCE = ''
PARAMETERS = ['codes.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.dec, self.codes = nn.Linear(4, 2), nn.Linear(2, 1), nn.Embedding(5, 2)

    def forward(self, x):
        z = self.enc(x)
        nearest = torch.cdist(z, self.codes.weight).argmin(1)
        q = self.codes(nearest)
        aux = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        return self.dec(z + (q - z).detach()), aux


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)

    def step():
        opt.zero_grad()
        out, aux = model(x)
        loss = F.mse_loss(out, y) + aux
        loss.backward()
        opt.step()
        return loss
    return model, opt, step
