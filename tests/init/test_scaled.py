import math

import pytest
import torch
from torch import nn

import learnables as ln
from learnables import init
from learnables.errors import LearnablesError, ShapeError

TORCH = [
    (init.xavier_uniform(0.7), lambda x, g: nn.init.xavier_uniform_(x, 0.7, generator=g)),
    (init.xavier_normal(), lambda x, g: nn.init.xavier_normal_(x, generator=g)),
    (init.kaiming_uniform(), lambda x, g: nn.init.kaiming_uniform_(x, generator=g)),
    (
        init.kaiming_uniform(a=math.sqrt(5)),
        lambda x, g: nn.init.kaiming_uniform_(x, a=math.sqrt(5), generator=g),
    ),
    (
        init.kaiming_normal(mode="fan_out", nonlinearity="relu"),
        lambda x, g: nn.init.kaiming_normal_(x, 0, "fan_out", "relu", generator=g),
    ),
]


@pytest.mark.parametrize("shape", [(12, 7), (6, 5, 3, 3), (4, 3, 2, 3, 3)], ids=str)
@pytest.mark.parametrize(("ours", "theirs"), TORCH, ids=[repr(ours) for ours, _ in TORCH])
def test_torch_gives_the_same_numbers_where_it_reads_the_shape_alike(ours, theirs, shape) -> None:
    x = ours(torch.empty(shape), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(x, theirs(torch.empty(shape), torch.Generator().manual_seed(2)))


@pytest.mark.parametrize(
    ("shape", "role", "wanted"),
    [
        ((30, 20), None, (20, 30)),
        ((30, 20), "linear", (20, 30)),
        ((30, 20), "projection", (30, 20)),
        ((8, 30, 20), "experts", (30, 20)),
        ((8, 30, 20), "linear", (20, 30)),
        ((30, 20, 5), "conv", (100, 150)),
        ((30, 20, 5, 3), None, (300, 450)),
    ],
)
def test_fans_follow_the_role(shape, role, wanted) -> None:
    assert init.fans(torch.Size(shape), role) == wanted


@pytest.mark.parametrize(
    ("shape", "role"), [((8, 30, 20), None), ((5,), None), ((5, 3), "experts")]
)
def test_a_shape_that_leaves_its_fans_open_is_refused(shape, role) -> None:
    with pytest.raises(ShapeError, match="what its dimensions mean"):
        init.fans(torch.Size(shape), role)


@pytest.mark.parametrize("distribution", ["normal", "uniform", "trunc_normal"])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_variance_is_the_scale_over_the_fan(distribution, mode, dtype) -> None:
    one = init.variance_scaling(2.0, mode, distribution)
    x = one(torch.empty(300, 200, dtype=dtype), generator=torch.Generator().manual_seed(0))
    fan = {"fan_in": 200, "fan_out": 300, "fan_avg": 250}[mode]
    wide = x if x.is_complex() else x.double()
    assert wide.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.01)


def test_a_stack_of_experts_has_the_fan_of_one_expert_where_torch_does_not() -> None:
    torch.manual_seed(0)
    bank = ln.parameter(16, 64, 256, init=init.kaiming_normal(), role="experts")
    one = nn.init.kaiming_normal_(torch.empty(256, 64))
    assert bank.std().item() == pytest.approx(one.std().item(), rel=0.03)
    wrong = nn.init.kaiming_normal_(torch.empty(16, 64, 256))
    assert wrong.std().item() == pytest.approx(one.std().item() / 16, rel=0.03)


def test_activations_keep_their_variance_through_fifty_relu_layers() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 128)
    for _ in range(50):
        x = torch.relu(x @ init.kaiming_normal()(torch.empty(128, 128)).T)
    assert 0.1 < x.pow(2).mean() < 10


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: init.variance_scaling(-1.0),
        lambda: init.variance_scaling(1.0, "fan"),
        lambda: init.variance_scaling(1.0, "fan_in", "cauchy"),
        lambda: init.kaiming_normal(nonlinearity="no such"),
    ],
)
def test_words_without_meaning_are_refused(wrong) -> None:
    with pytest.raises(LearnablesError, match="wanted"):
        wrong()
