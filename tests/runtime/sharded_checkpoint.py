"""Run by torchrun: train a step, save, load into a fresh model, train a step, compare."""

import sys
from pathlib import Path

import torch
from torch import nn

import learnables as ln
from learnables._torch import end_process_group


def build(wrap=lambda model: model, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    model.gate = ln.parameter(torch.randn(4), weight_decay="init")
    model = wrap(model)
    return model, torch.optim.AdamW(ln.param_groups(model, lr=0.05, weight_decay=0.1))


def step(model, optimizer):
    torch.manual_seed(1)  # the same batch on every rank, so one process does the same
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()


def main(strategy, folder):
    torch.distributed.init_process_group("gloo")
    if strategy == "ddp":
        wrap = lambda model: nn.parallel.DistributedDataParallel(  # noqa: E731
            model,
            find_unused_parameters=True,  # the gate
        )
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        wrap = lambda model: fully_shard(model, mesh=mesh)  # noqa: E731
    model, optimizer = build(wrap)
    step(model, optimizer)
    ln.save_checkpoint(folder / "two.safetensors", model, optimizer)
    torch.distributed.barrier()
    again, optimizer_again = build(wrap, seed=5)
    ln.load_checkpoint(folder / "two.safetensors", again, optimizer_again)
    step(model, optimizer)
    step(again, optimizer_again)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(*(p.to_local() if hasattr(p, "to_local") else p for p in (a, b)))
    ln.save_checkpoint(folder / "two_after.safetensors", model)
    torch.distributed.barrier()
    end_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
