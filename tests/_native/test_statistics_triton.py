"""The Triton kernels against the twin in torch, by Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from learnables._native import statistics_torch

pytest.importorskip("triton", reason="Triton is not installed; pip install 'learnables[dev]'")
from learnables._native import statistics_triton
from learnables.stats import FORCE, backend, statistics

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
pytestmark = [
    pytest.mark.skipif(
        not statistics_triton.available(DEVICE)[0],
        reason=f"no GPU and no interpreter: {statistics_triton.available(DEVICE)[1]}",
    ),
    # The interpreter computes with numpy, which warns where a GPU does not.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU on this machine")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def landscapes(dtype: torch.dtype) -> list[Tensor]:
    """Arrays that take every road through the kernel."""
    torch.manual_seed(0)
    normal = torch.randn(3000, dtype=torch.float64)
    special = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40, 3e38, 6e-8, 1e-320, 1e300]
    holes = normal * (torch.rand(3000) < 0.5)
    wide = normal * (torch.randn(3000, dtype=torch.float64) * 30).exp2()
    plain = [normal, normal[:0], normal[:1], normal[:1024], holes, -holes, wide, normal * 1e-39]
    listed = [*plain, torch.tensor(special, dtype=torch.float64), normal * torch.nan]
    long = torch.randn(statistics_triton._CHUNK + 1500 if dtype is torch.float32 else 1500)
    return [x.to(dtype).to(DEVICE) for x in (*listed, long, torch.full((2000,), -1.5))]


def assert_agrees(seen: tuple[Tensor, ...], arrays: list[Tensor]) -> None:
    moments, integers, bins = (part.cpu() for part in seen)
    arrays = [x.cpu() for x in arrays]
    wanted = statistics_torch.run(arrays, True)
    torch.testing.assert_close(moments[2:], wanted[0][2:], rtol=0, atol=0)
    torch.testing.assert_close(integers, wanted[1], rtol=0, atol=0)
    torch.testing.assert_close(bins, wanted[2], rtol=0, atol=0)
    for row, x in enumerate(arrays):
        exact = torch.where(x.isfinite(), x, 0).double()
        torch.testing.assert_close(moments[1, row], exact.square().sum(), rtol=1e-12, atol=0)
        assert (moments[0, row] - exact.sum()).abs() <= 1e-12 * exact.abs().sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_torch(dtype: torch.dtype) -> None:
    arrays = landscapes(dtype)
    assert_agrees(statistics_triton.run(arrays, True), arrays)


def test_dtypes_mix_in_one_launch_and_addresses_need_no_alignment() -> None:
    arrays = [torch.randn(2500).to(dtype).to(DEVICE)[shift:] for shift, dtype in enumerate(DTYPES)]
    assert_agrees(statistics_triton.run(arrays, True), arrays)


def test_histogram_is_optional_and_changes_nothing_else() -> None:
    arrays = [torch.randn(2500, device=DEVICE)]
    with_it, without = (statistics_triton.run(arrays, wanted) for wanted in (True, False))
    assert without[2] is None
    assert torch.equal(with_it[0], without[0])
    assert torch.equal(with_it[1], without[1])


def test_statistics_uses_it_when_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE, "triton")
    x = torch.randn(40, 30, device=DEVICE)
    assert backend(x).name == "triton"
    seen = statistics([x.t(), x[:0]])
    monkeypatch.setenv(FORCE, "torch")
    wanted = statistics([x.t(), x[:0]])
    torch.testing.assert_close(seen.pack(), wanted.pack(), rtol=1e-12, atol=1e-12)


def test_compiles_for_gpus_that_are_not_here(tmp_path) -> None:
    """What the interpreter accepts is not yet Triton; ptxas has the last word."""
    code = """
from learnables._native import statistics_triton as s
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

lists = dict.fromkeys(["addresses", "sizes", "kinds", "first", "row_of"], "*i64")
for histogram in (True, False):
    known = {"HISTOGRAM": histogram, "ALIGNED": True, "CHUNK": s._CHUNK, "TILE": s._TILE}
    types = {**lists, "partial": "*fp64", "bins": "*i64", "total": "i64"}
    source = ASTSource(s._look, {**types, **dict.fromkeys(known, "constexpr")}, constexprs=known)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert built.asm["cubin"] and "ld.global.v4" in built.asm["ptx"]
types = {"first": "*i64", "partial": "*fp64", "moments": "*fp64", "integers": "*i64"}
types |= {"total": "i64", "rows": "i64", "STEP": "constexpr"}
source = ASTSource(s._add_up, types, constexprs={"STEP": 256})
assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@needs_gpu
def test_nothing_waits_for_the_gpu() -> None:
    arrays = [torch.randn(300_000, device=DEVICE), torch.randn(77, device=DEVICE).half()]
    statistics(arrays)
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen = statistics(arrays)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen.count.tolist() == [300_000, 77]


@needs_gpu
def test_three_launches_whatever_the_number_of_tensors() -> None:
    arrays = [torch.randn(1000 + n, device=DEVICE).to(DTYPES[n % 4]) for n in range(50)]
    statistics_triton.run(arrays, True)
    with torch.profiler.profile() as profile:
        statistics_triton.run(arrays, True)
        torch.cuda.synchronize()
    launches = [
        e for e in profile.events() if e.device_type.name == "CUDA" and "Memcpy" not in e.name
    ]
    assert len(launches) <= 3, [e.name for e in launches]


class Counted:
    """A kernel that counts how often it is launched."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        launch = self.kernel[grid]

        def launched(*args, **kwargs):
            self.launches += 1
            return launch(*args, **kwargs)

        return launched


@pytest.mark.parametrize("histogram", [True, False])
@pytest.mark.parametrize("number", [1, 50])
def test_two_kernels_are_launched_once_each(number: int, histogram: bool, monkeypatch) -> None:
    """The third launch on a GPU is that of torch, which empties the histogram."""
    kernels = [Counted(statistics_triton._look), Counted(statistics_triton._add_up)]
    monkeypatch.setattr(statistics_triton, "_look", kernels[0])
    monkeypatch.setattr(statistics_triton, "_add_up", kernels[1])
    arrays = [torch.randn(10 + n).to(DTYPES[n % 4]).to(DEVICE) for n in range(number)]
    statistics_triton.run(arrays, histogram)
    assert [kernel.launches for kernel in kernels] == [1, 1]
