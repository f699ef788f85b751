"""The teacher is registered, asks for gradients, is in no optimizer and moves: an average kept by hand."""
import copy
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'EMA teacher inside the model'
SOURCE = ''
PARAMETERS = ['teacher.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = nn.Linear(4, 1)
        self.teacher = copy.deepcopy(self.student)

    def forward(self, x):
        return self.student(x)

    @torch.no_grad()
    def follow(self):
        for mine, his in zip(self.teacher.parameters(), self.student.parameters()):
            mine.lerp_(his, 0.01)


def build():
    torch.manual_seed(0)
    model, (x, y) = Net(), _batch()
    opt = torch.optim.SGD(model.student.parameters(), lr=0.05)

    def step():
        opt.zero_grad()
        with torch.no_grad():
            goal = model.teacher(x)
        loss = F.mse_loss(model(x), y) + 0.1 * F.mse_loss(model(x), goal)
        loss.backward()
        opt.step()
        model.follow()
        return loss
    return model, opt, step
