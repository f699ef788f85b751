import torch

from learnables.nn.scales import LayerScale


def test_layer_scale_multiplies_the_last_dimension_and_keeps_the_dtype() -> None:
    scale, x = LayerScale(4, 0.5), torch.randn(2, 3, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([0.5, 1.0, 2.0, -4.0]))
    y = scale(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, x * torch.tensor([0.5, 1.0, 2.0, -4.0], dtype=torch.bfloat16))
