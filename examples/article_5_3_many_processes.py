"""Section 5.3 of the article: a custom parameter in many processes.

What the article's own code does wrong: `device="cuda:0"` puts the parameter of every process on the
first GPU, which DDP then refuses; DataParallel copies the model anew for every forward. And what
people do after that: an optimizer built before the model is sharded holds Parameters that nothing
uses any more, and `weight.norm()` of a shard is the norm of the shard.
"""

import os
import subprocess
import sys

import torch
from torch import Tensor, nn

import learnables as ln
from learnables.launch import join, leave


class Gated(nn.Module):
    """A linear map with a learned gate. No device is named: `.to(device)` moves it all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = ln.parameter(16, 16, init=ln.init.orthogonal())
        self.gate = ln.parameter(1, 1, 16, init=ln.init.ones(), weight_decay=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) * self.gate.flatten()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Called by `prepare` once the Parameters are those that will be trained."""
    return torch.optim.AdamW(ln.param_groups(model, lr=0.01, weight_decay=0.1))


def train(strategy: str, rank: int, size: int, device: torch.device) -> list[float]:
    """Ten steps on 64 samples, of which each process takes its share; the norms at the end."""
    torch.manual_seed(0)
    model, optimizer, _ = ln.prepare(Gated().to(device), adam, strategy)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).to(device)
    target = x.roll(1, dims=1)
    mine = slice(rank * 64 // size, (rank + 1) * 64 // size)
    for _ in range(10):
        optimizer.zero_grad()
        (model(x[mine]) - target[mine]).square().mean().backward()
        optimizer.step()
    # Of whole parameters, wherever their shards lie, and two collectives for all of them.
    return ln.statistics(list(model.parameters())).norm().tolist()


def in_each_process() -> None:
    device = join("cuda" if torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"]) else "cpu")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    alone = train("none", 0, 1, device)
    for strategy in ("ddp", "fsdp2"):
        together = train(strategy, rank, size, device)
        gap = max(abs(a - b) / b for a, b in zip(together, alone, strict=True))
        if rank == 0:
            print(f"{strategy} on {size} processes and one process: norms differ by {gap:.0e}")
        assert gap < 1e-5
    leave()


def main() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, __file__], check=True)


if __name__ == "__main__":
    in_each_process() if "RANK" in os.environ else main()
