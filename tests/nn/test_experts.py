import torch
from torch import nn

from learnables.nn import ExpertBank, Projection


def test_each_expert_is_a_linear_layer() -> None:
    bank, x = ExpertBank(3, 4, 5, bias=True), torch.randn(3, 7, 4)
    with torch.no_grad():
        bank.bias.normal_()
    y = bank(x)
    for e in range(3):
        torch.testing.assert_close(y[e], nn.functional.linear(x[e], bank.weight[e].T, bank.bias[e]))


def test_each_expert_starts_as_a_linear_layer_does() -> None:
    torch.manual_seed(0)
    bank, one = ExpertBank(8, 256, 64), nn.Linear(256, 64)
    assert bank.weight.abs().max() <= 256**-0.5
    torch.testing.assert_close(bank.weight.std(), one.weight.std(), rtol=0.03, atol=0)


def test_a_projection_multiplies_from_the_right() -> None:
    projection, x = Projection(4, 3), torch.randn(2, 5, 4)
    torch.testing.assert_close(projection(x), x @ projection.weight)
