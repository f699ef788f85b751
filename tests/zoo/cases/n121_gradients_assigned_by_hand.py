"""The gradients come from torch.func.grad and are assigned; backward is never called."""
from torch.func import functional_call, grad_and_value
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'gradients from torch.func.grad'
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
        params = {name: p.detach() for name, p in model.named_parameters()}

        def objective(params):
            return F.mse_loss(functional_call(model, params, (x,)), y)

        grads, loss = grad_and_value(objective)(params)
        for name, p in model.named_parameters():
            p.grad = grads[name]
        opt.step()
        return loss
    return model, opt, step
