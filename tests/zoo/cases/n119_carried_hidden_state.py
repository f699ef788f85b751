"""The hidden state of a recurrence is carried from batch to batch in a plain attribute, one row per sample."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'hidden state kept between batches'
SOURCE = ''
PARAMETERS = ['hidden']      # look suspicious, are fine
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
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.hidden = torch.zeros(1, 32, 4)
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        out, hidden = self.rnn(x[:, None], self.hidden)
        self.hidden = hidden.detach()
        return self.fc(out[:, 0])


def build():
    torch.manual_seed(0)
    model = Net()
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.05), *_batch())
