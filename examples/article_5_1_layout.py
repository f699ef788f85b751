"""Section 5.1 of the article: the memory layout of a big matrix.

What the article's own code does wrong: FSDP2 and safetensors refuse a column-major Parameter, and
F.linear with a contiguous weight already is the product that the other layout was meant to give.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import learnables as ln


def attempt(what: str, call) -> None:
    try:
        call()
        print(f"{what}: works")
    except (ValueError, NotImplementedError, RuntimeError) as error:
        print(f"{what}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")


def main() -> None:
    torch.manual_seed(0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    folder = Path(tempfile.mkdtemp())
    for name, make in {
        "column-major": lambda: nn.Parameter(torch.randn(256, 256).t().contiguous().t()),
        "ln.parameter": lambda: ln.parameter(torch.randn(256, 256).t().contiguous().t()),
    }.items():
        model = nn.Module()
        model.weight = make()
        print(f"{name}: strides {model.weight.stride()}")
        save = lambda m=model, n=name: save_file({"weight": m.weight.detach()}, folder / n)  # noqa: E731
        attempt("  safetensors", save)
        attempt("  FSDP2", lambda m=model: fully_shard(m))
    x, weight = torch.randn(8, 256), torch.randn(256, 256)
    same = torch.allclose(nn.functional.linear(x, weight), x @ weight.t(), atol=1e-4)
    print(f"F.linear(x, weight) is x @ weight.t(): {same}; no copy, no other layout needed")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
