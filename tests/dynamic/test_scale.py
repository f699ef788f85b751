import pytest
import torch
from torch.nn import functional as F

from learnables.dynamic.scale import GATES, second_moment, sum_of_squares
from learnables.errors import LearnablesError


@pytest.mark.parametrize("activation", [F.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.elu])
def test_second_moment_is_that_of_a_large_sample(activation) -> None:
    z = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert second_moment(activation) == pytest.approx(
        activation(z).square().mean().item(), rel=0.01
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("num", [1, 3, 16])
def test_sum_of_squares_is_that_of_a_large_sample(gate, num) -> None:
    logits = torch.randn(100_000, num, generator=torch.Generator().manual_seed(1))
    found = GATES[gate](logits).square().sum(1).mean().item()
    assert sum_of_squares(gate, num) == pytest.approx(found, rel=0.03)


def test_an_activation_that_gives_nothing_is_refused() -> None:
    with pytest.raises(LearnablesError, match="mean square 0"):
        second_moment(torch.zeros_like)
