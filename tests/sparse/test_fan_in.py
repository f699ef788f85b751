import pytest
import torch

from learnables.errors import ShapeError
from learnables.sparse import Layout, random
from learnables.sparse.fan_in import real_fan_in


def test_output_keeps_the_variance_of_a_dense_layer() -> None:
    torch.manual_seed(0)
    layout = Layout(256, 512, 16, random(16, 32, 0.125))
    init = real_fan_in(layout, gain=3**0.5)
    weight = init(torch.empty(layout.weight_shape))
    dense = torch.zeros(16, 32, 16, 16)
    dense[layout.mask] = weight
    y = torch.randn(2000, 512) @ dense.transpose(1, 2).reshape(256, 512).T
    assert y.std().item() == pytest.approx(1.0, rel=0.03)
    assert weight.std().item() == pytest.approx(
        real_fan_in(layout, 3**0.5).wanted_std(weight.shape), rel=0.02
    )


def test_rows_are_filled_by_their_own_fan_in() -> None:
    layout = Layout(6, 8, (2, 4), [[1, 1], [1, 0], [0, 0]])
    weight = real_fan_in(layout)(torch.empty(3, 2, 4))
    assert weight[:2].abs().max() <= 8**-0.5
    assert 8**-0.5 < weight[2].abs().max() <= 0.5
    bias = real_fan_in(layout)(torch.empty(6))
    assert bias[4:].eq(0).all()
    assert bias[:4].ne(0).all()


@pytest.mark.parametrize("shape", [(4, 40, 60), (70,)])
def test_the_wanted_deviation_is_the_one_that_comes(shape) -> None:
    init = real_fan_in(Layout(70, 110, (40, 60), torch.ones(2, 2)))
    std = torch.cat([init(torch.empty(shape)).flatten() for _ in range(50)]).std().item()
    assert std == pytest.approx(init.wanted_std(torch.Size(shape)), rel=0.03)


def test_what_reaches_over_the_edge_is_zero() -> None:
    layout = Layout(5, 7, 4, torch.ones(2, 2))
    weight = real_fan_in(layout)(torch.empty(layout.weight_shape))
    assert weight[~layout.edge_mask].eq(0).all()
    assert weight[layout.edge_mask].ne(0).all()


def test_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"found: \(2, 2\)"):
        real_fan_in(Layout(4, 4, 2, torch.ones(2, 2)))(torch.empty(2, 2))
