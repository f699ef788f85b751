import torch
import torch.nn.functional as F

from learnables.nn import DyT, Snake, StateSpaceVectors


def test_dyt_is_the_formula() -> None:
    dyt, x = DyT(4), torch.randn(3, 4)
    with torch.no_grad():
        for param in dyt.parameters():
            param.normal_()
    torch.testing.assert_close(dyt(x), dyt.gamma * torch.tanh(dyt.alpha * x) + dyt.beta)


def test_snake_is_the_formula_for_each_channel() -> None:
    snake, x = Snake(3), torch.randn(2, 3, 8)
    torch.testing.assert_close(snake(x), x + x.sin() ** 2)
    with torch.no_grad():
        snake.log_alpha.normal_()
        snake.log_beta.normal_()
    for c in range(3):
        alpha, beta = snake.log_alpha[0, c].exp(), snake.log_beta[0, c].exp()
        torch.testing.assert_close(snake(x)[:, c], x[:, c] + (alpha * x[:, c]).sin() ** 2 / beta)


def test_state_space_vectors_start_in_their_ranges() -> None:
    torch.manual_seed(0)
    vectors = StateSpaceVectors(1000, dt_min=1e-3, dt_max=0.1)
    a, d, dt = vectors(torch.zeros(1000))
    assert -16 <= a.min() < -15
    assert -2 < a.max() <= -1
    assert torch.equal(d, torch.ones(1000))
    assert 0.9e-3 < dt.min() < 2e-3
    assert 0.05 < dt.max() < 0.101
    shifted = vectors(torch.ones(1000)).dt
    torch.testing.assert_close(shifted, F.softplus(1 + vectors.dt_bias))
