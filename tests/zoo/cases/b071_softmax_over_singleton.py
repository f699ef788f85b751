"""softmax(scores, dim=-1) with scores of shape (n, 1) is the constant 1: the attention scorer gets
zero gradient."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'softmax over a dimension of size one'
SOURCE = 'DEEP-PolyU/KEQA_WSDM19#2'
PARAMETERS = ['score.weight']
STAGE = 'step'
REVEALED_BY = '1 step'
CAUGHT_BY = "measured: article's three prints, torcheck, torchtest, torch-audit (info)"
GUILTY = 'softmax(dim=1 if'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.score = nn.Linear(1, 1, bias=False)        # a bias would be softmax-invariant
        self.fc = nn.Linear(1, 1)

    def forward(self, x):
        tokens = x.unsqueeze(-1)                              # batch, tokens, 1
        weight = self.score(tokens).softmax(dim=1 if self.fixed else 2)
        return self.fc((weight * tokens).sum(1))


def _make(fixed):
    torch.manual_seed(0)
    model, (x, y) = Net(fixed), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        return loss
    return model, opt, step


def build():
    return _make(fixed=False)


def build_fixed():
    return _make(fixed=True)


def witness(make):
    model, opt, step = make()
    step()
    g = float(model.score.weight.grad.abs().max())
    return g < 1e-7, f"|grad of the scorer weight| = {g:.2e}"
