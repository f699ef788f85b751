import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learnables import init
from learnables.errors import LearnablesError

FAMILIES = [
    init.uniform(-0.3, 0.1),
    init.normal(0.02),
    init.normal(1e-6),
    init.trunc_normal(0.02),
    init.trunc_normal(0.5, mean=3.0, cut=1.0),
    init.log_uniform(1e-3, 1e-1),
]
REAL = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_std_found_is_the_std_wanted_in_every_precision(
    family: init.Initializer, dtype: torch.dtype
) -> None:
    if dtype == torch.float16 and family == init.normal(1e-6):
        pytest.skip("1e-6 is below what float16 resolves")
    x = family(torch.empty(200_000, dtype=dtype), generator=torch.Generator().manual_seed(0))
    assert x.double().std().item() == pytest.approx(family.wanted_std(x.shape), rel=0.012)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("family", [init.normal(0.5), init.trunc_normal(0.5)], ids=repr)
def test_a_complex_tensor_has_the_std_as_a_whole(
    family: init.Initializer, dtype: torch.dtype
) -> None:
    x = family(torch.empty(200_000, dtype=dtype), generator=torch.Generator().manual_seed(0))
    assert x.std().item() == pytest.approx(family.wanted_std(x.shape), rel=0.01)
    assert x.real.std().item() == pytest.approx(x.imag.std().item(), rel=0.02)


def test_torch_itself_gives_the_same_numbers() -> None:
    pairs = [
        (init.uniform(-1, 2), lambda x, g: torch.nn.init.uniform_(x, -1, 2, generator=g)),
        (init.normal(0.3), lambda x, g: torch.nn.init.normal_(x, 0, 0.3, generator=g)),
        (
            init.trunc_normal(0.3),
            lambda x, g: torch.nn.init.trunc_normal_(x, 0, 0.3, -0.6, 0.6, generator=g),
        ),
    ]
    for ours, theirs in pairs:
        x = ours(torch.empty(50, 7), generator=torch.Generator().manual_seed(1))
        y = theirs(torch.empty(50, 7), torch.Generator().manual_seed(1))
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_values_do_not_depend_on_dtype_or_memory_format(family: init.Initializer) -> None:
    def draw(x: torch.Tensor) -> torch.Tensor:
        return family(x, generator=torch.Generator().manual_seed(7))

    plain = draw(torch.empty(2, 3, 4, 5))
    half = draw(torch.empty(2, 3, 4, 5, dtype=torch.bfloat16))
    last = draw(torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    strided = draw(torch.empty(5, 4, 3, 2).permute(3, 2, 1, 0))
    assert torch.equal(plain.bfloat16(), half)
    assert torch.equal(plain, last)
    assert torch.equal(plain, strided)


@given(cut=st.floats(0.3, 5), seed=st.integers(0, 2**16))
def test_nothing_lies_beyond_the_cut(cut: float, seed: int) -> None:
    family = init.trunc_normal(0.1, mean=1.0, cut=cut)
    x = family(torch.empty(500), generator=torch.Generator().manual_seed(seed))
    assert (x - 1).abs().max() <= 0.1 * cut + 1e-6


def test_every_magnitude_is_equally_likely_under_log_uniform() -> None:
    x = init.log_uniform(1e-4, 1.0)(torch.empty(40_000), generator=torch.Generator().manual_seed(0))
    share = [((x >= 10.0**k) & (x < 10.0 ** (k + 1))).float().mean() for k in range(-4, 0)]
    assert share == pytest.approx([0.25] * 4, abs=0.015)
    assert init.log_uniform(2.0, 2.0).wanted_std(x.shape) == 0


def test_a_std_of_zero_is_the_mean() -> None:
    assert torch.equal(init.trunc_normal(0.0, mean=2.0)(torch.empty(3)), torch.full((3,), 2.0))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: init.uniform(1, 0),
        lambda: init.normal(-1),
        lambda: init.trunc_normal(math.nan),
        lambda: init.trunc_normal(cut=0),
        lambda: init.log_uniform(0, 1),
    ],
)
def test_numbers_without_meaning_are_refused_when_they_are_given(wrong) -> None:
    with pytest.raises(LearnablesError, match="wanted"):
        wrong()
