"""step is a method of a trainer that counts, schedules and keeps a history."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'a trainer object'
SOURCE = ''
PARAMETERS = ['model.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Trainer:
    def __init__(self):
        self.model, (self.x, self.y) = nn.Linear(4, 1), _batch()
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.sched = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, 10)
        self.count, self.history = 0, []

    def step(self):
        self.count += 1
        self.opt.zero_grad()
        loss = F.mse_loss(self.model(self.x), self.y)
        loss.backward()
        self.opt.step()
        self.sched.step()
        self.history.append(float(loss.detach()))
        return loss


def build():
    torch.manual_seed(0)
    trainer = Trainer()
    return trainer.model, trainer.opt, trainer.step
