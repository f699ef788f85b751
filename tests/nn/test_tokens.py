import pytest
import torch

import learnables as ln
from learnables.errors import PolicyError, ShapeError
from learnables.nn import (
    ClassToken,
    DistillationToken,
    MarkerToken,
    MaskToken,
    NullCondition,
    RegisterTokens,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_come_first_and_take_the_dtype_of_the_sequence(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 8, dtype=dtype)
    for component, n in ((ClassToken(8), 1), (RegisterTokens(4, 8), 4)):
        y = component(x)
        assert y.dtype == dtype
        assert torch.equal(y[:, n:], x)
        assert torch.equal(y[:, :n], component.tokens.to(dtype).expand(3, n, 8))


def test_every_token_of_a_batch_sends_its_gradient_back() -> None:
    tokens = RegisterTokens(2, 4)
    tokens(torch.zeros(3, 5, 4)).sum().backward()
    torch.testing.assert_close(tokens.tokens.grad, torch.full((1, 2, 4), 3.0))


def test_the_distillation_token_stands_behind_the_class_token_when_added_first() -> None:
    distill, cls, x = DistillationToken(4), ClassToken(4), torch.randn(2, 3, 4)
    y = cls(distill(x))
    assert torch.equal(y[:, 0], cls.tokens[0].expand(2, 4))
    assert torch.equal(y[:, 1], distill.tokens[0].expand(2, 4))


def test_masked_tokens_are_replaced_and_get_no_gradient() -> None:
    token, x = MaskToken(4, init=ln.init.ones()), torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    y = token(x, mask)
    assert torch.equal(y[mask], torch.ones(3, 4))
    assert torch.equal(y[~mask], x[~mask])
    y.sum().backward()
    assert torch.equal(x.grad[..., 0], (~mask).float())
    torch.testing.assert_close(token.tokens.grad, torch.full((1, 1, 4), 3.0))


def test_a_batch_without_masked_tokens_still_uses_the_parameter() -> None:
    token = MaskToken(4)
    token(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)).sum().backward()
    assert torch.equal(token.tokens.grad, torch.zeros(1, 1, 4))


@pytest.mark.parametrize("mask", [torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.bool)])
def test_a_mask_of_other_shape_or_type_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="bool of shape"):
        MaskToken(4)(torch.zeros(2, 3, 4), mask)


def test_conditions_are_dropped_in_training_only_at_the_stated_rate() -> None:
    torch.manual_seed(0)
    null, c = NullCondition(2, probability=0.3), torch.ones(5000, 2)
    dropped = (null(c) == 0).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(null.eval()(c), c)
    with pytest.raises(ShapeError, match="one bool for each sample"):
        null(c, drop=torch.zeros(5000))
    with pytest.raises(PolicyError, match="probability is no share"):
        NullCondition(2, probability=1.5)


def test_a_marker_ends_every_sequence_or_every_row() -> None:
    marker = MarkerToken(4)
    assert torch.equal(marker(torch.zeros(2, 3, 4))[:, -1], marker.tokens[0].expand(2, 4))
    rows = marker(torch.zeros(2, 3, 5, 4))
    assert rows.shape == (2, 3, 6, 4)
    assert torch.equal(rows[:, :, -1], marker.tokens.expand(2, 3, 4))
