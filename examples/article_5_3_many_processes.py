"""Section 5.3 of the article: a custom parameter in many processes.

What the article's own code does wrong: `device="cuda:0"` puts the parameter of every process on the
first GPU, which DDP then refuses; DataParallel copies the model anew for every forward.
"""

import os
import subprocess
import sys

import torch
from torch import Tensor, nn

import learnables as ln


class Gated(nn.Module):
    """A linear map with a learned gate. No device is named: `.to(device)` moves it all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = ln.parameter(16, 16, init=ln.init.orthogonal())
        self.gate = ln.parameter(16, init=ln.init.ones(), weight_decay=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) * self.gate


def train(rank: int, size: int) -> nn.Module:
    """Ten steps on 64 samples, of which each process takes its share."""
    device = torch.device(f"cuda:{rank}" if torch.cuda.device_count() >= size > 1 else "cpu")
    torch.manual_seed(0)
    model = Gated().to(device)
    runner = nn.parallel.DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.AdamW(ln.param_groups(runner, lr=0.01, weight_decay=0.1))
    x = torch.randn(64, 16).to(device)
    target = x.roll(1, dims=1)
    mine = slice(rank * 64 // size, (rank + 1) * 64 // size)
    for _ in range(10):
        optimizer.zero_grad()
        (runner(x[mine]) - target[mine]).square().mean().backward()
        optimizer.step()
    return model


def in_each_process() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpus = torch.cuda.device_count() >= size
    torch.distributed.init_process_group("nccl" if gpus else "gloo")
    together = train(rank, size)
    if rank == 0:
        alone = train(0, 1)
        pairs = zip(together.parameters(), alone.parameters(), strict=True)
        gap = max((a.cpu() - b.cpu()).abs().max().item() for a, b in pairs)
        print(f"{size} processes and one end at the same values: largest difference {gap:.1e}")
        assert gap < 1e-5
    torch.distributed.destroy_process_group()


def main() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, __file__], check=True)


if __name__ == "__main__":
    in_each_process() if "RANK" in os.environ else main()
