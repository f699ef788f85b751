import pytest
import torch

from learnables.errors import ShapeError
from learnables.nn.color import ColorMatrix


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
