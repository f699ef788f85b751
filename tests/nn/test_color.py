import pytest
import torch

from learnables.errors import ShapeError
from learnables.nn.color import ColorLUT, ColorMatrix


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_matrix_equals_the_permuted_product(channels: int, layout: torch.memory_format) -> None:
    color = ColorMatrix(channels)
    with torch.no_grad():
        color.matrix.normal_()
        color.bias.normal_()
    x = torch.randn(2, channels, 4, 6).contiguous(memory_format=layout)
    y = color(x)
    slow = (x.permute(0, 2, 3, 1) @ color.matrix + color.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(y, slow)
    assert y.is_contiguous(memory_format=layout)


def test_gradients_of_the_matrix_are_right() -> None:
    color = ColorMatrix(2).double()
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return color(x)

    assert torch.autograd.gradcheck(run, (x, color.matrix, color.bias))


def test_matrix_decays_toward_the_identity() -> None:
    from learnables.entries import entries

    matrix, bias = entries(ColorMatrix(3))
    assert matrix.initial is not None
    assert torch.equal(matrix.initial, torch.eye(3))
    assert matrix.places[0].note.get("weight_decay") == "init"
    assert bias.places[0].note.get("weight_decay") is False


def test_an_image_of_other_channels_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(B, 3, H, W\)"):
        ColorMatrix(3)(torch.zeros(1, 4, 2, 2))


def slow_lookup(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Eight corners of the cell that a pixel is in, weighed by hand."""
    size, y = table.shape[1], torch.zeros_like(x)
    for b in range(x.shape[0]):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                red, green, blue = (x[b, :, i, j].clamp(0, 1) * (size - 1)).tolist()
                for corner in range(8):
                    weight, index = 1.0, []
                    for bit, at in ((1, blue), (2, green), (4, red)):
                        low = min(int(at), size - 2)
                        high = bool(corner & bit)
                        weight *= at - low if high else 1 - (at - low)
                        index.append(low + high)
                    y[b, :, i, j] += weight * table[:, index[0], index[1], index[2]]
    return y


def test_lookup_is_trilinear_with_red_running_fastest() -> None:
    torch.manual_seed(0)
    lut, x = ColorLUT(4), torch.rand(2, 3, 3, 4) * 1.4 - 0.2
    with torch.no_grad():
        lut.table.normal_()
    torch.testing.assert_close(lut(x), slow_lookup(lut.table.detach(), x), atol=1e-5, rtol=1e-5)


def test_identity_table_returns_the_image_and_clips_what_lies_beyond() -> None:
    x = torch.rand(2, 3, 5, 7) * 2 - 0.5
    torch.testing.assert_close(ColorLUT(17)(x), x.clamp(0, 1), atol=1e-6, rtol=0)


def test_an_identity_stays_one_on_another_lattice() -> None:
    small, large = ColorLUT(9), ColorLUT(33)
    large.load_state_dict(small.state_dict())
    torch.testing.assert_close(large.table, ColorLUT(33).table, atol=1e-6, rtol=0)
    with pytest.raises(ShapeError, match="not its channels"):
        large.load_state_dict({"table": torch.zeros(1, 9, 9, 9)})


def test_regularisers_are_zero_where_the_table_is_even_and_rising() -> None:
    lut = ColorLUT(5)
    assert lut.monotonicity().item() == 0
    torch.testing.assert_close(lut.total_variation(), torch.tensor([1 / 3 * 0.25**2 * 3]))
    with torch.no_grad():
        lut.table.neg_()
    assert lut.monotonicity().item() == pytest.approx(1 / 3 * 0.25 * 3)


def test_a_table_refuses_other_channels() -> None:
    with pytest.raises(ShapeError, match="three channels"):
        ColorLUT(5)(torch.zeros(1, 4, 2, 2))
