import pytest
import torch

from learnables.errors import ShapeError
from learnables.nn import RotaryFrequencies


def test_every_pair_is_turned_by_its_angle() -> None:
    rotary, grid = RotaryFrequencies(2, 8), (2, 3)
    x = torch.randn(1, 2, 6, 8)
    y = rotary(x, grid)
    for head in range(2):
        for n in range(6):
            angle = (n % 3) * rotary.frequencies[0, head] + (n // 3) * rotary.frequencies[1, head]
            turn = torch.polar(torch.ones(4), angle.detach())
            wanted = torch.view_as_complex(x[0, head, n].view(4, 2)) * turn
            torch.testing.assert_close(torch.view_as_complex(y[0, head, n].view(4, 2)), wanted)


def test_products_depend_on_the_offset_only() -> None:
    torch.manual_seed(0)
    rotary = RotaryFrequencies(1, 8)
    q, k = torch.randn(8), torch.randn(8)
    at = rotary(torch.stack([q] * 20)[None, None], (4, 5))[0, 0].view(4, 5, 8)
    to = rotary(torch.stack([k] * 20)[None, None], (4, 5))[0, 0].view(4, 5, 8)
    torch.testing.assert_close(at[0, 1] @ to[2, 3], at[1, 2] @ to[3, 4])


def test_frequencies_start_as_two_perpendicular_ladders_of_the_paper() -> None:
    fx, fy = RotaryFrequencies(3, 16, theta=10.0).frequencies.detach()
    size = 10.0 ** (-torch.arange(4) * 4 / 16)
    torch.testing.assert_close((fx**2 + fy**2).sqrt(), size.repeat(2).expand(3, 8))
    first, second = (fx[:, :4], fy[:, :4]), (fx[:, 4:], fy[:, 4:])
    dot = first[0] * second[0] + first[1] * second[1]
    torch.testing.assert_close(dot, torch.zeros(3, 4), atol=1e-6, rtol=0)
    assert (fx[0] - fx[1]).abs().max() > 1e-3


def test_prefix_tokens_stay_and_wrong_grids_are_refused() -> None:
    rotary, x = RotaryFrequencies(2, 8), torch.randn(1, 2, 7, 8)
    assert torch.equal(rotary(x, (2, 3), prefix=1)[:, :, 0], x[:, :, 0])
    with pytest.raises(ShapeError, match="fill the grid"):
        rotary(x, (2, 3))
    with pytest.raises(ShapeError, match="divisible by 4"):
        RotaryFrequencies(2, 6)
