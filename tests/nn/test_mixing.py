import pytest
import torch

from learnables.errors import ShapeError
from learnables.nn import AdaLNTable, LayerMix, ResidualMix


def test_layers_are_averaged_by_softmax() -> None:
    mix, layers = LayerMix(4), torch.randn(4, 2, 3)
    torch.testing.assert_close(mix(layers), layers.mean(0))
    with torch.no_grad():
        mix.logits.normal_()
        mix.gamma.fill_(2.0)
    wanted = 2 * torch.einsum("l,lbn->bn", mix.logits.softmax(0), layers)
    torch.testing.assert_close(mix(layers), wanted)
    torch.testing.assert_close(mix(list(layers)), wanted)
    with pytest.raises(ShapeError, match="3 layers"):
        mix(layers[:3])


def test_residual_mix_starts_as_a_plain_residual() -> None:
    mix, x, first = ResidualMix(), torch.randn(3), torch.randn(3)
    assert torch.equal(mix(x, first), x)
    with torch.no_grad():
        mix.lambdas.copy_(torch.tensor([0.5, 3.0]))
    torch.testing.assert_close(mix(x, first), 0.5 * x + 3 * first)


def test_modulation_is_the_condition_plus_the_table() -> None:
    table, condition = AdaLNTable(4, num_pieces=3), torch.randn(2, 12)
    pieces = table(condition)
    for n, piece in enumerate(pieces):
        torch.testing.assert_close(piece[:, 0], condition[:, 4 * n : 4 * n + 4] + table.table[n])
    torch.testing.assert_close(table(condition.view(2, 3, 4)), pieces)
    with pytest.raises(ShapeError, match="modulation table"):
        table(torch.zeros(2, 8))
