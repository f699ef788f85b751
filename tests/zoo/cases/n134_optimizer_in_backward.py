"""Each parameter has an optimizer of its own that steps inside backward, to save the memory of the gradients."""
import torch
from torch import nn
from torch.nn import functional as F

TITLE = 'optimizer step fused into backward'
SOURCE = ''
PARAMETERS = ['0.weight']      # look suspicious, are fine
STAGE = 'negative'


def _batch(n=32, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, 1, generator=g)



def build():
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), _batch()
    opts = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}

    def hook(p):
        opts[p].step()
        opts[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)

    def step():
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss
    return model, next(iter(opts.values())), step
