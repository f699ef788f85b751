import math

import pytest
import torch

from learnables.errors import PolicyError
from learnables.nn import LogitBias, LogitScale, Temperature
from learnables.nn.logits import bounded


def test_logit_scale_multiplies_by_the_exponential() -> None:
    x = torch.randn(3)
    torch.testing.assert_close(LogitScale(1 / 0.07)(x), x / 0.07)
    torch.testing.assert_close(LogitBias()(x), x - 10)


def test_the_bound_holds_in_the_forward_pass() -> None:
    scale = LogitScale(10.0, maximum=100.0)
    for raw, wanted in ((99.0, 100.0), (-3.0, 1.0)):
        with torch.no_grad():
            scale.log_scale.fill_(raw)
        torch.testing.assert_close(scale.scale(), torch.tensor([wanted]))


@pytest.mark.parametrize(("value", "sign"), [(5.0, 1), (-1.0, -1)])
def test_a_scale_behind_its_bound_comes_back_where_clamp_is_stuck(value: float, sign: int) -> None:
    def run(through) -> float:
        x = torch.tensor([value], requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=1.0)
        for _ in range(20):
            optimizer.zero_grad()
            (sign * through(x)).sum().backward()  # wants x smaller (larger)
            optimizer.step()
        return x.item()

    assert run(lambda x: x.clamp(0.0, 1.0)) == value
    assert abs(run(lambda x: bounded(x, 0.0, 1.0)) - value) > 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_gradient_that_leads_out_is_held_back(sign: int) -> None:
    x = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    (sign * bounded(x, 0.0, 1.0)).sum().backward()
    # A step goes against the gradient: +1 moves left, which helps only above; −1 only below.
    assert x.grad.tolist() == ([0, 1, 1] if sign == 1 else [-1, -1, 0])


def test_temperature_is_per_head_and_bounded() -> None:
    temperature, x = Temperature(3, 2.0, maximum=4.0), torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(temperature(x), 2 * x)
    with torch.no_grad():
        temperature.log_scale.copy_(torch.tensor([0.5, 1.0, 9.0]).log().view(3, 1, 1))
    torch.testing.assert_close(temperature(x), torch.tensor([0.5, 1.0, 4.0]).view(3, 1, 1) * x)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LogitScale(0.5),
        lambda: LogitScale(101.0),
        lambda: Temperature(1, 0.0),
        lambda: Temperature(1, math.nan),
    ],
)
def test_a_start_outside_the_bounds_is_refused(wrong) -> None:
    with pytest.raises(PolicyError, match="within its bounds"):
        wrong()
