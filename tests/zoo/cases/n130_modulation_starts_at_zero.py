"""adaLN-zero: the table that modulates the block starts at 0, so the block has no gradient in the first step."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'modulation initialised to zero'
SOURCE = ''
PARAMETERS = ['mlp.weight']      # look suspicious, are fine
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
        self.norm, self.mlp, self.mod = nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 4), nn.Linear(4, 12)
        nn.init.zeros_(self.mod.weight), nn.init.zeros_(self.mod.bias)
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        shift, scale, gate = self.mod(x).chunk(3, -1)
        return self.fc(x + gate * self.mlp(self.norm(x) * (1 + scale) + shift))


def build():
    torch.manual_seed(0)
    model = Net()
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.05), *_batch())
