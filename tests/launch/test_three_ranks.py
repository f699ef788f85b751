"""Three ranks divide no width and no batch here, and train as one process does."""

import torch
import torch.distributed as dist
from tests.gloo import spawn
from torch import nn

import learnables as ln


class Net(nn.Module):
    """Nothing in it is a multiple of three."""

    def __init__(self) -> None:
        super().__init__()
        self.token = ln.parameter(1, 5, 8, init=ln.init.normal(0.5))
        self.mix = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.mix(x + self.token) * self.scale


def adam(model):
    return torch.optim.AdamW(ln.param_groups(model, lr=0.05, weight_decay=0.1))


def trained(strategy, rows):
    torch.manual_seed(0)
    model, optimizer, report = ln.prepare(Net(), adam, strategy)
    assert report.ok
    x = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        # the mean over ranks of each rank's share: 3, 3 and 2 rows weigh as many as they are
        (model(x[rows]).square().sum() * max(1, dist_size()) / x.numel()).backward()
        optimizer.step()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]


def dist_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def as_one(rank, one, strategies):
    for strategy in strategies:
        mine = trained(strategy, slice(rank, None, 3))
        for a, b in zip(mine, one, strict=True):
            torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-4, atol=1e-5)


def test_three_ranks_train_as_one_under_ddp_and_fsdp2():
    spawn(as_one, 3, trained("none", slice(None)), ("ddp", "fsdp2"))


def test_another_share_of_the_batch_would_be_told_apart():
    one, other = trained("none", slice(None)), trained("none", slice(0, 4))
    pairs = zip(one, other, strict=True)
    assert any(not torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
