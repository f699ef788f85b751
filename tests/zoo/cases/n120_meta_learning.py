"""The outer loss reaches the parameters through an inner gradient step on copies of them."""
from torch.func import functional_call
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'MAML by functional_call'
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

    def step():
        opt.zero_grad()
        params = dict(model.named_parameters())
        inner = F.mse_loss(functional_call(model, params, (x[:16],)), y[:16])
        grads = torch.autograd.grad(inner, list(params.values()), create_graph=True)
        adapted = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads)}
        loss = F.mse_loss(functional_call(model, adapted, (x[16:],)), y[16:])
        loss.backward()
        opt.step()
        return loss
    return model, opt, step
