"""The C kernel against its twin in torch: integers and bins bit for bit, sums to 1e-12."""

import ctypes
import subprocess
import sys

import pytest
import torch
from tests.kernels import kernel as kernel
from torch import Tensor

from learnables import _native
from learnables._native import statistics_torch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Around a block (2048), the size from which a pair table pays (16384), and a chunk (131072).
SIZES = (0, 1, 7, 2047, 2048, 2049, 16383, 16384, 20000, 131071, 131072, 131073, 300001)


def assert_agrees(seen: tuple[Tensor, ...], arrays: list[Tensor]) -> None:
    moments, integers, bins = seen
    wanted = statistics_torch.run(arrays, True)
    torch.testing.assert_close(moments[2:], wanted[0][2:], rtol=0, atol=0)
    torch.testing.assert_close(integers, wanted[1], rtol=0, atol=0)
    torch.testing.assert_close(bins, wanted[2], rtol=0, atol=0)
    for row, x in enumerate(arrays):
        exact = torch.where(x.isfinite(), x, 0).double()
        torch.testing.assert_close(moments[1, row], exact.square().sum(), rtol=1e-12, atol=0)
        error = (moments[0, row] - exact.sum()).abs()
        assert error <= 1e-12 * exact.abs().sum()


def landscapes(size: int) -> dict[str, Tensor]:
    """Arrays that take every road through the kernel, in float64."""
    normal = torch.randn(size, dtype=torch.float64)
    holes = normal.clone()
    holes[torch.rand(size) < 0.5] = 0.0
    holes[torch.rand(size) < 0.1] = -0.0
    broken = normal.clone()
    broken[torch.rand(size) < 1e-4] = torch.nan
    broken[torch.rand(size) < 1e-4] = torch.inf
    broken[size // 2 : size // 2 + 5] = -torch.inf
    drifting = normal * torch.linspace(-60, 60, max(size, 1), dtype=torch.float64)[:size].exp2()
    return {
        "normal": normal * 0.02,
        "half zeros": holes,
        "non-finite": broken,
        "all NaN": torch.full((size,), torch.nan, dtype=torch.float64),
        "wider than the window": normal * (torch.randn(size, dtype=torch.float64) * 30).exp2(),
        "window that moves": drifting,
        "subnormals": normal * 1e-39,
        "constant": torch.full((size,), -1.5, dtype=torch.float64),
        "signs": normal.sign(),
        "negative": -normal.abs() - 1e-3,
        "positive": normal.abs() + 1e-3,
        "zeros": torch.zeros(size, dtype=torch.float64),
    }


@pytest.mark.parametrize("baseline", [False, True], ids=["best", "baseline"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", landscapes(0))
def test_agrees_with_torch(kernel, name: str, dtype: torch.dtype, baseline: bool) -> None:
    torch.manual_seed(0)
    arrays = [landscapes(size)[name].to(dtype) for size in SIZES]
    assert_agrees(kernel.run(arrays, True, threads=1, baseline=baseline), arrays)


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_number_of_threads_changes_no_bit(kernel, threads: int) -> None:
    arrays = [torch.randn(n) for n in (1_000_000, 3, 500_001)]
    one, many = (kernel.run(arrays, True, threads=n) for n in (1, threads))
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a, b)


def test_histogram_is_optional_and_changes_nothing_else(kernel) -> None:
    arrays = [torch.randn(300_000)]
    with_it, without = kernel.run(arrays, True, threads=1), kernel.run(arrays, False, threads=1)
    assert without[2] is None
    assert torch.equal(with_it[0], without[0])
    assert torch.equal(with_it[1], without[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_from_any_address(kernel, dtype: torch.dtype) -> None:
    arrays = [torch.randn(20_003).to(dtype)[shift:] for shift in range(9)]
    assert_agrees(kernel.run(arrays, True, threads=1), arrays)


def test_every_half_and_every_bfloat16_is_counted_in_its_bin(kernel) -> None:
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    arrays = [words.view(torch.float16), words.view(torch.bfloat16)]
    shuffled = [x[torch.randperm(2**16)] for x in arrays]
    assert_agrees(kernel.run(shuffled, True, threads=1), arrays)


def test_a_missing_or_broken_library_is_a_reason_not_an_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(_native.FOLDER, str(tmp_path))
    _native.load.cache_clear()
    try:
        assert _native.load("statistics") == (
            None,
            f"statistics.c was not built: no _statistics.* in {tmp_path}",
        )
        (tmp_path / "_statistics.so").write_bytes(b"not a library")
        _native.load.cache_clear()
        library, why = _native.load("statistics")
        assert library is None
        assert why.startswith("_statistics.so cannot be loaded")
    finally:
        monkeypatch.undo()
        _native.load.cache_clear()


def test_the_interpreter_is_free_meanwhile(kernel) -> None:
    """ctypes.CDLL lets go of the lock; PyDLL would not."""
    library, _ = _native.load("statistics")
    assert type(library) is ctypes.CDLL


def test_a_child_made_by_fork_can_call_it_too(kernel) -> None:
    code = (
        "import os, torch\n"
        "from learnables._native import statistics as s\n"
        "x = torch.ones(1_000_000)\n"
        "s.run([x], True, threads=2)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(0 if s.run([x], True, threads=2)[0][0].item() == 1e6 else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
