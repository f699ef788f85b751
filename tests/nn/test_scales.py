import pytest
import torch

from learnables.errors import PolicyError
from learnables.nn import Gate, HeadScale, LayerScale, LayerScale2d, QKScale, ReZero


def test_layer_scale_multiplies_the_last_dimension_and_keeps_the_dtype() -> None:
    scale, x = LayerScale(4, 0.5), torch.randn(2, 3, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([0.5, 1.0, 2.0, -4.0]))
    y = scale(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, x * torch.tensor([0.5, 1.0, 2.0, -4.0], dtype=torch.bfloat16))


def test_layer_scale_of_images_multiplies_channels() -> None:
    scale, x = LayerScale2d(3), torch.randn(2, 3, 4, 5)
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([0.5, 1.0, -4.0]).view(3, 1, 1))
    torch.testing.assert_close(scale(x), x * torch.tensor([0.5, 1.0, -4.0]).view(1, 3, 1, 1))


def test_a_step_on_a_small_scale_is_lost_in_bfloat16_but_not_in_fp32() -> None:
    for dtype, moves in ((torch.float32, True), (torch.bfloat16, False)):
        scale = LayerScale(1, 1.0).to(dtype)
        before = scale.gamma.clone()
        with torch.no_grad():
            scale.gamma.sub_(1e-3)
        assert torch.equal(scale.gamma, before) != moves


def test_rezero_starts_closed_and_opens_by_its_gradient() -> None:
    rezero, x = ReZero(), torch.tensor([1.0, 2.0])
    y = rezero(x)
    assert torch.equal(y, torch.zeros(2))
    y.sum().backward()
    assert rezero.alpha.grad.item() == 3.0


@pytest.mark.parametrize("kind", ["tanh", "sigmoid"])
def test_gates_are_their_function(kind) -> None:
    gate, x = Gate(4, kind, value=1.0), torch.randn(2, 4)
    torch.testing.assert_close(gate(x), x * getattr(torch, kind)(gate.alpha))
    with pytest.raises(PolicyError, match="'tanh' or 'sigmoid'"):
        Gate(kind="relu")


def test_head_scale_multiplies_heads() -> None:
    scale, x = HeadScale(3), torch.randn(2, 3, 4, 5)
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1))
    for head in range(3):
        torch.testing.assert_close(scale(x)[:, head], (head + 1) * x[:, head])


def test_queries_and_keys_are_brought_to_length_one_before_the_scale() -> None:
    scale, x = QKScale(3, 5, value=2.0), torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(scale(x), 2 * x / x.norm(dim=-1, keepdim=True))
    half = scale(x.half() * 1000)  # squares beyond what float16 holds
    assert torch.isfinite(half).all()
    torch.testing.assert_close(half.float(), scale(x), atol=5e-3, rtol=5e-3)
