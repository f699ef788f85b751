import pytest
import torch
from torch import nn

from learnables import init
from learnables.errors import LearnablesError, ShapeError


def test_identity_is_batched_and_rectangular() -> None:
    assert torch.equal(
        init.identity(2.0)(torch.empty(3, 2, 4)), 2 * torch.eye(2, 4).expand(3, 2, 4)
    )
    with pytest.raises(ShapeError, match="two dimensions"):
        init.identity()(torch.empty(4))


@pytest.mark.parametrize(("shape", "role"), [((5, 5, 3, 3), None), ((5, 5, 3), "conv")])
def test_identity_of_a_convolution_is_the_one_of_torch_and_returns_the_image(shape, role) -> None:
    weight = init.identity()(torch.empty(shape), role=role)
    assert torch.equal(weight, nn.init.dirac_(torch.empty(shape)))


def test_constants_also_complex() -> None:
    assert torch.equal(init.ones()(torch.empty(2)), torch.ones(2))
    assert torch.equal(init.zeros()(torch.empty(2)), torch.zeros(2))
    assert torch.equal(
        init.constant(2.0)(torch.empty(1, dtype=torch.complex64)), torch.tensor([2 + 0j])
    )


def test_arange_runs_along_the_last_dimension() -> None:
    x = init.arange(1, 0.5)(torch.empty(2, 3))
    assert torch.equal(x, torch.tensor([[1.0, 1.5, 2.0]]).expand(2, 3))


@pytest.mark.parametrize("low", [1e-6, 1e-3, 30.0])
def test_softplus_of_the_inverse_gives_back_what_was_drawn(low: float) -> None:
    drawn = init.log_uniform(low, low * 100)
    x = init.softplus_inverse(drawn)(torch.empty(500), generator=torch.Generator().manual_seed(1))
    y = drawn(torch.empty(500), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.logaddexp(x, torch.zeros(())), y, rtol=1e-4, atol=0)


def test_log_of_a_draw_is_undone_by_exp() -> None:
    drawn = init.uniform(1, 16)
    x = init.log(drawn)(torch.empty(100), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        x.exp(), drawn(torch.empty(100), generator=torch.Generator().manual_seed(1))
    )


def test_like_copies_values_up_to_leading_ones() -> None:
    table = torch.randn(3, 4)
    one = init.like(table)
    assert torch.equal(one(torch.empty(1, 3, 4)), table[None])
    assert torch.equal(one(torch.empty(3, 4, dtype=torch.bfloat16)), table.bfloat16())
    table.zero_()
    assert one(torch.empty(3, 4)).abs().max() > 0
    with pytest.raises(ShapeError, match="moments"):
        one(torch.empty(4, 4))


def test_like_draws_with_the_moments_of_each_feature() -> None:
    torch.manual_seed(0)
    table = torch.randn(5000, 3) * torch.tensor([0.1, 1.0, 3.0]) + torch.tensor([5.0, 0.0, -2.0])
    x = init.like(table, how="moments")(torch.empty(20_000, 3))
    torch.testing.assert_close(x.mean(0), table.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(x.std(0), table.std(0), atol=0, rtol=0.05)
    other = init.like(table, how="moments")(torch.empty(20_000))
    assert other.std().item() == pytest.approx(table.std().item(), rel=0.05)
    with pytest.raises(LearnablesError, match="'values' or 'moments'"):
        init.like(table, how="copy")


def test_sincos_in_one_dimension_is_the_formula() -> None:
    x = init.sincos1d()(torch.empty(1, 6, 8, dtype=torch.float64))[0]
    for n in range(6):
        for k in range(4):
            angle = torch.tensor(n / 10000 ** (k / 4), dtype=torch.float64)
            torch.testing.assert_close(x[n, k], angle.sin())
            torch.testing.assert_close(x[n, 4 + k], angle.cos())


def test_sincos_in_two_dimensions_encodes_row_then_column() -> None:
    x = init.sincos2d((3, 5), prefix=2)(torch.empty(1, 17, 8, dtype=torch.float64))
    assert x[:, :2].abs().max() == 0
    rows = init.sincos1d()(torch.empty(3, 4, dtype=torch.float64))
    columns = init.sincos1d()(torch.empty(5, 4, dtype=torch.float64))
    image = x[0, 2:].view(3, 5, 8)
    torch.testing.assert_close(image[..., :4], rows[:, None].expand(3, 5, 4))
    torch.testing.assert_close(image[..., 4:], columns[None].expand(3, 5, 4))
    with pytest.raises(ShapeError, match="one row for each place"):
        init.sincos2d((3, 5))(torch.empty(1, 17, 8))
    with pytest.raises(ShapeError, match="even number"):
        init.sincos1d()(torch.empty(4, 3))
