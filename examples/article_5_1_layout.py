"""Section 5.1 of the article: the memory layout of a big matrix, measured instead of believed.

The article stores a Parameter column-major, for speed. Here is what that costs, what it gains on
this machine, and what goes wrong in silence once an optimizer is fused.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import learnables as ln
from learnables.launch import leave
from learnables.runtime.layout_comparison import compare_layouts


def attempt(what: str, call) -> None:
    try:
        call()
        print(f"{what}: works")
    except (ValueError, NotImplementedError, RuntimeError) as error:
        print(f"{what}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")


def who_refuses_it() -> None:
    folder = Path(tempfile.mkdtemp())
    for name, make in {
        "column-major": lambda: nn.Parameter(torch.randn(256, 256).t().contiguous().t()),
        "ln.parameter": lambda: ln.parameter(torch.randn(256, 256).t().contiguous().t()),
    }.items():
        model = nn.Module()
        model.weight = make()
        print(f"{name}: strides {model.weight.stride()}")
        for finding in ln.audit(model, select=["LRN62"]).findings:
            print(f"  the audit: {finding.what}; {finding.found}")
        save = lambda m=model, n=name: save_file({"weight": m.weight.detach()}, folder / n)  # noqa: E731
        attempt("  safetensors", save)
        attempt("  FSDP2", lambda m=model: fully_shard(m))


def what_it_gains() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        print(compare_layouts(1024, 1024, 64, dtype=dtype, seconds=0.3), end="\n\n")
    x, weight = torch.randn(8, 256), torch.randn(256, 256)
    same = torch.allclose(nn.functional.linear(x, weight), x @ weight.t(), atol=1e-4)
    print(f"F.linear(x, weight) is x @ weight.t(): {same}; no copy, no other layout needed")


def what_goes_wrong() -> None:
    """A step of a fused optimizer on every second column of a bigger matrix."""
    x = torch.randn(8, 64)
    for mended in (False, True):
        whole = torch.zeros(64, 128)
        model = nn.Module()
        model.even = nn.Parameter(whole[:, ::2])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        if mended:
            print(f"ln.canonicalize_ moved: {ln.canonicalize_(model, optimizer, separate=True)}")
        (x @ model.even + 1).square().mean().backward()
        wanted = model.even.detach() - 0.1 * model.even.grad
        optimizer.step()
        wrong = int((model.even != wanted).sum())
        foreign = int((whole[:, 1::2] != 0).sum())
        print(
            f"  {wrong} of {wanted.numel()} values are wrong, {foreign} of the neighbours changed"
        )


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("1. Who refuses a column-major Parameter")
    who_refuses_it()
    leave()
    print("\n2. What it gains here")
    what_it_gains()
    print("\n3. What a fused optimizer makes of a slice")
    what_goes_wrong()


if __name__ == "__main__":
    main()
