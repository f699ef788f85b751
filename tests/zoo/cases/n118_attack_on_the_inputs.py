"""The attack calls backward on the model and clears what it left before the real step."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'adversarial training'
SOURCE = ''
PARAMETERS = ['fc.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.fc = nn.Linear(8, 1)

    def forward(self, x):
        return self.fc(torch.tanh(self.body(x)))


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)

    def step():
        noise = torch.zeros_like(x, requires_grad=True)
        for _ in range(2):
            F.mse_loss(model(x + noise), y).backward()
            noise.data = (noise.data + 0.01 * noise.grad.sign()).clamp(-0.1, 0.1)
            noise.grad = None
        opt.zero_grad()
        loss = F.mse_loss(model(x + noise.detach()), y)
        loss.backward()
        opt.step()
        return loss
    return model, opt, step
