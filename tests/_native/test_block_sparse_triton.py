"""The Triton kernels against the twin in torch, by Triton's interpreter where there is no GPU."""

import builtins
import os
import subprocess
import sys

import pytest
import torch

from learnables.errors import LayoutError
from learnables.sparse import Layout, backend, block_sparse_linear, kernels, random, reference
from learnables.sparse.plan import plan_of

pytest.importorskip("triton", reason="Triton is not installed; pip install 'learnables[dev]'")
from triton.runtime import interpreter

from learnables._native import block_sparse_triton

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
there, why = block_sparse_triton.available(DEVICE)
pytestmark = pytest.mark.skipif(not there, reason=f"no GPU and no interpreter: {why}")
SIZES = [(64, 96, 16), (70, 50, 16), (96, 64, (48, 32)), (128, 64, 64)]


class _AnyInt(type):
    def __instancecheck__(cls, x):
        return isinstance(x, builtins.int)


class as_int(builtins.int, metaclass=_AnyInt):
    """For Triton 3.6, which calls ``int`` on arrays of one; NumPy 2.4 refuses that."""

    def __new__(cls, x):
        return builtins.int(x.item() if hasattr(x, "item") else x)


@pytest.fixture(autouse=True)
def _interpreter_with_a_newer_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "int", as_int, raising=False)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", block_sparse_triton.DTYPES, ids=str)
def test_all_three_products_agree_with_torch(size, dtype) -> None:
    out, inp, block = size
    p, q = (block, block) if isinstance(block, int) else block
    rows, columns = -(-out // p), -(-inp // q)
    # The interpreter cuts bfloat16 off where a GPU rounds it.
    ulps = 1.01 if dtype == torch.bfloat16 and not GPU else 0.51
    for mask in (random(rows, columns, 0.5), torch.zeros(rows, columns), torch.ones(rows, columns)):
        layout = Layout(out, inp, block, mask)
        index = kernels.Index(*(part.to(DEVICE) for part in layout.index))
        made = {"dtype": dtype, "device": DEVICE}
        weight, bias = torch.randn(layout.weight_shape, **made), torch.randn(out, **made)
        for samples in (0, 1, 50):
            x, g = torch.randn(samples, inp, **made), torch.randn(samples, out, **made)
            wide = [t.double() for t in (x, weight, g, bias)]
            row_of = plan_of(index).row_of
            pairs = (
                (
                    block_sparse_triton.product(x, weight, index, bias, out),
                    reference.product(*wide[:2], index, out, wide[3], way="filled in"),
                ),
                (
                    block_sparse_triton.transposed_product(g, weight, index, inp),
                    reference.transposed_product(wide[2], wide[1], index, inp, way="filled in"),
                ),
                (
                    block_sparse_triton.sampled_product(g, x, index, row_of, (p, q)),
                    reference.sampled_product(wide[2], wide[0], index, (p, q), way="filled in"),
                ),
            )
            for ours, exact in pairs:
                assert ours.dtype == dtype
                assert ours.shape == exact.shape
                off = (ours.double() - exact).abs()
                most = exact.abs().amax() if exact.numel() else 0.0
                limit = ulps * torch.finfo(dtype).eps * exact.abs() + 1e-5 * most + 1e-6
                assert (off <= limit).all()


def test_a_layer_uses_it_when_forced_forward_and_backward(monkeypatch) -> None:
    layout = Layout(48, 64, 16, random(3, 4, 0.5))
    shapes = (20, 64), layout.weight_shape, (48,)
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    g, results = torch.randn(20, 48, device=DEVICE), []
    for name in ("triton", "torch"):
        monkeypatch.setenv(kernels.FORCE, name)
        assert backend(leaves[0]).name == name
        y = block_sparse_linear(leaves[0], leaves[1], layout, leaves[2])
        results.append((y, *torch.autograd.grad(y, leaves, g)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_blocks_that_fill_no_tile_and_bad_indices_go_another_way(monkeypatch) -> None:
    monkeypatch.setenv(kernels.FORCE, "triton")
    odd = Layout(24, 24, 12, torch.eye(2))
    weight, x = torch.randn(odd.weight_shape, device=DEVICE), torch.randn(3, 24, device=DEVICE)
    monkeypatch.setattr(block_sparse_triton, "product", None)  # would be called, and fail
    assert block_sparse_linear(x, weight, odd).shape == (3, 24)
    layout = Layout(32, 32, 16, torch.eye(2))
    index = kernels.Index(*(part.to(DEVICE).clone() for part in layout.index))
    index.columns[0] = 7
    with pytest.raises(LayoutError, match="columns from 1 to 7"):
        kernels.product(
            torch.randn(3, 32, device=DEVICE), torch.randn(2, 16, 16, device=DEVICE), index, 32
        )


def test_compiles_for_gpus_that_are_not_here(tmp_path) -> None:
    """What the interpreter accepts is not yet Triton; and loads must be pipelined across blocks."""
    code = """
from learnables._native import block_sparse_triton as s
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

def build(kernel, types, known, arch, **options):
    types = {**types, **dict.fromkeys(known, "constexpr")}
    types = {name: types[name] for name in kernel.arg_names}
    whole = [i for i, n in enumerate(types) if types[n][0] == "*" or n in "depth width height"]
    source = ASTSource(
        kernel, types, constexprs=known,
        attrs={(i,): [["tt.divisibility", 16]] for i in whole},
    )
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]

same = {"PRECISION": "ieee", "WIDEN": False, "BUCKET": 512}
pointers = dict.fromkeys(["x", "weight", "bias", "y", "g"], "*bf16")
pointers |= dict.fromkeys(["starts", "places", "order", "rows", "columns"], "*i64")
numbers = dict.fromkeys(["samples", "depth", "width", "height", "tiles"], "i32")
for transposed in (True, False):
    known = {"TRANSPOSED": transposed, "DEPTH": 64, "WIDTH": 64, "HAS_BIAS": transposed,
             "HAS_ORDER": not transposed, "TILE_M": 128, "TILE_N": 64, "TILE_K": 64, **same}
    types = {**pointers, **numbers, "columns": "i32"}
    ptx = build(s._panels.fn, types, known, 90, num_warps=8, num_stages=3)
    assert "wgmma" in ptx and "cp.async" in ptx
    assert "mma.sync" in build(s._panels.fn, types, known, 80, num_warps=4, num_stages=3)
known = {"P": 64, "Q": 64, "TILE_P": 64, "TILE_Q": 64, "TILE_K": 64, **same}
ptx = build(s._sampled.fn, {**pointers, **numbers}, known, 90, num_warps=4, num_stages=3)
assert "wgmma" in ptx and "cp.async" in ptx
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
