import pytest
import torch

from learnables.nn.tokens import ClassToken, RegisterTokens


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
