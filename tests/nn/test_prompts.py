import math

import pytest
import torch

from learnables.errors import ShapeError
from learnables.nn import DeepPrompts, MemoryKeyValues, MemoryTokens, Prompts


def test_prompts_stand_behind_the_prefix() -> None:
    prompts, x = Prompts(3, 8, prefix=2), torch.randn(2, 7, 8)
    y = prompts(x)
    assert torch.equal(y[:, :2], x[:, :2])
    assert torch.equal(y[:, 2:5], prompts.tokens.expand(2, 3, 8))
    assert torch.equal(y[:, 5:], x[:, 2:])


def test_prompts_start_as_in_the_paper() -> None:
    bound = math.sqrt(6 / (3 * 16 * 16 + 768))
    tokens = Prompts(100, 768).tokens
    assert bound * 0.99 < tokens.abs().max() <= bound


def test_prompts_are_dropped_in_training_only() -> None:
    torch.manual_seed(0)
    prompts, x = Prompts(50, 8, dropout=0.5), torch.zeros(1, 0, 8)
    assert 0.3 < (prompts(x) == 0).float().mean() < 0.7
    assert torch.equal(prompts.eval()(x), prompts.tokens)


def test_deep_prompts_put_in_at_the_first_layer_and_replace_at_every_other() -> None:
    prompts, x = DeepPrompts(3, 2, 8, prefix=1), torch.randn(2, 5, 8)
    y = x
    for layer in range(3):
        y = prompts(y, layer)
        assert y.shape == (2, 7, 8)
        assert torch.equal(y[:, 1:3], prompts.tokens[layer].expand(2, 2, 8))
        assert torch.equal(torch.cat([y[:, :1], y[:, 3:]], 1), x)
    with pytest.raises(ShapeError, match="layer < 3"):
        prompts(y, 3)


@pytest.mark.parametrize(
    ("make", "dim"),
    [
        (lambda n: Prompts(n, 8), 1),
        (lambda n: DeepPrompts(3, n, 8), 1),
        (lambda n: MemoryTokens(n, 8), 1),
        (lambda n: MemoryKeyValues(2, n, 8), 1),
    ],
    ids=["Prompts", "DeepPrompts", "MemoryTokens", "MemoryKeyValues"],
)
def test_another_number_of_tokens_loads(make, dim: int) -> None:
    few, many, again = make(3), make(5), make(3)
    many.load_state_dict(few.state_dict())
    again.load_state_dict(many.state_dict())
    for name, param in few.named_parameters():
        longer = many.get_parameter(name)
        assert torch.equal(longer.narrow(dim, 0, 3), param)
        fresh = longer.narrow(dim, 3, 2)
        assert fresh.abs().max() > 0
        assert not torch.equal(fresh, param.narrow(dim, 0, 2))
        assert torch.equal(again.get_parameter(name), param)


def test_another_width_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"wanted: \(1, any, 8\)"):
        Prompts(3, 8).load_state_dict(Prompts(3, 9).state_dict())


def test_memory_is_read_back() -> None:
    memory, x = MemoryTokens(3, 8), torch.randn(2, 5, 8)
    front, back = memory.split(memory(x))
    assert torch.equal(front, memory.tokens.expand(2, 3, 8))
    assert torch.equal(back, x)


def test_memory_keys_and_values_come_first() -> None:
    memory, k, v = MemoryKeyValues(2, 3, 4), torch.randn(5, 2, 6, 4), torch.randn(5, 2, 6, 4)
    keys, values = memory(k, v)
    for both, own, given in ((keys, memory.keys, k), (values, memory.values, v)):
        assert torch.equal(both[:, :, :3], own.expand(5, 2, 3, 4))
        assert torch.equal(both[:, :, 3:], given)
