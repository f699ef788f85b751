"""The C kernel against its twins in torch, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learnables._native import rounding as native
from learnables.policy import rounding

built = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])
LEVELS = [native.BASELINE, native.AVX2, native.AVX512]
BF16 = torch.bfloat16


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def numbers(counts: list[int], seed: int) -> list[torch.Tensor]:
    """Any bits at all: normal and subnormal numbers, zeros, infinities, every kind of NaN."""
    g = torch.Generator().manual_seed(seed)
    xs = []
    for count in counts:
        x = torch.randint(-(2**31), 2**31 - 1, (count,), generator=g, dtype=torch.int32)
        x[::5] &= -65536  # fit into bfloat16
        x[1::7] = 0x7FFFFFFF  # the NaN of CUDA, which overflows when half a unit is added
        x[2::11] = -1
        x[3::13] = 0x7F800000
        xs.append(x.view(torch.float32))
    return xs


sizes = st.lists(st.integers(0, 300), min_size=1, max_size=4)


@built
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [1, 3])
@settings(max_examples=25, deadline=None)
@given(counts=sizes, seed=st.integers(0, 2**20))
def test_every_instruction_set_agrees_with_the_twin(level, threads, counts, seed) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_PER_THREAD", 64)
        check(counts, seed, threads, level)


def check(counts, seed, threads, level) -> None:
    xs = numbers(counts, seed)
    options = {"threads": threads, "level": level}

    def halves():
        return [torch.full((n,), 7, dtype=BF16) for n in counts]

    def lows():
        return [torch.full((n,), 7, dtype=torch.int16) for n in counts]

    narrow, lower = halves(), lows()
    native.run_(native.NARROW, xs, narrow, lower, **options)
    twin, twins_lower = halves(), lows()
    with pytest.MonkeyPatch.context() as patch:  # the slow way
        patch.setattr(rounding, "_fits", lambda *_: False)
        rounding._narrow_(twin, [x.clone() for x in xs], twins_lower)
        noisy = halves()
        rounding._round_stochastically_(noisy, [x.clone() for x in xs], seed)
        wide = [torch.empty(n) for n in counts]
        rounding._widen_(wide, narrow, lower)
        plain = [torch.empty(n) for n in counts]
        rounding._widen_(plain, narrow)
    for a, b in zip([*narrow, *lower], [*twin, *twins_lower], strict=True):
        assert torch.equal(bits_of(a), bits_of(b))
    out = [torch.empty(n) for n in counts]
    native.run_(native.WIDEN, out, narrow, lower, **options)
    assert all(torch.equal(bits_of(a), bits_of(b)) for a, b in zip(out, wide, strict=True))
    native.run_(native.WIDEN, out, narrow, [None] * len(xs), **options)
    assert all(torch.equal(bits_of(a), bits_of(b)) for a, b in zip(out, plain, strict=True))
    starts = rounding._starts(xs)[:-1]
    found, none = halves(), [None] * len(xs)
    native.run_(native.STOCHASTIC, xs, found, none, starts, rounding._mixed(seed), **options)
    assert all(torch.equal(bits_of(a), bits_of(b)) for a, b in zip(found, noisy, strict=True))


@built
def test_chunks_are_put_together_whatever_the_number_of_threads() -> None:
    check([200_001, 65_536, 1, 0, 131_072], 5, 4, native.AVX512)


def test_sixteen_bits_of_noise_are_even_and_of_no_pattern() -> None:
    like = [torch.empty(1 << 16)]
    (one,), (two,) = rounding._noise(like, 2), rounding._noise(like, 3)
    for noise in (one, two):
        counts = torch.bincount((noise.int() + 32768) >> 10, minlength=64).double()
        chi = float(((counts - 1024).square() / 1024).sum())
        assert 25 < chi < 120  # 63 degrees of freedom
    a, b = one.double(), two.double()
    for x, y in ((a, b), (a[1:], a[:-1]), (a[2:], a[:-2])):
        assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) < 0.02
