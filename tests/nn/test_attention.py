import torch

from learnables.nn import AttentionSinks, DifferentialLambda, HeadMixing, QueryValueBias


def test_heads_are_mixed_by_columns_of_the_matrix() -> None:
    mixing, attention = HeadMixing(3), torch.rand(2, 3, 4, 5)
    with torch.no_grad():
        mixing.matrix.normal_()
    y = mixing(attention)
    for out in range(3):
        wanted = sum(mixing.matrix[i, out] * attention[:, i] for i in range(3))
        torch.testing.assert_close(y[:, out], wanted)


def test_a_sink_takes_its_share_of_every_row() -> None:
    sinks, logits = AttentionSinks(3), torch.randn(2, 3, 4, 5)
    with torch.no_grad():
        sinks.logits.normal_()
    share = logits.exp() / (logits.exp().sum(-1, keepdim=True) + sinks.logits.exp().view(3, 1, 1))
    torch.testing.assert_close(sinks(logits), share)


def test_a_row_that_may_see_nothing_is_zero_with_a_finite_gradient() -> None:
    sinks = AttentionSinks(1)
    logits = torch.full((1, 1, 2, 3), float("-inf"), requires_grad=True)
    y = sinks(logits)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.isfinite(sinks.logits.grad).all()


def test_lambda_is_the_formula() -> None:
    lam = DifferentialLambda(8, start=0.3)
    wanted = (lam.q1 @ lam.k1).exp() - (lam.q2 @ lam.k2).exp() + 0.3
    torch.testing.assert_close(lam.value(), wanted[None])
    first, second = torch.rand(2, 4, 3, 3), torch.rand(2, 4, 3, 3)
    torch.testing.assert_close(lam(first, second), first - wanted * second)


def test_keys_get_no_bias() -> None:
    bias, qkv = QueryValueBias(2), torch.zeros(3, 6)
    with torch.no_grad():
        bias.query.fill_(1)
        bias.value.fill_(2)
    assert bias(qkv)[0].tolist() == [1, 1, 0, 0, 2, 2]
