import pytest
import torch

from learnables.errors import ShapeError
from learnables.nn import Queries, SlotEmbeddings, Slots


def test_every_sample_gets_the_same_queries_without_a_copy() -> None:
    queries = Queries(3, 8)
    y = queries(torch.zeros(4, 2, 5))
    assert torch.equal(y, queries.tokens.expand(4, 3, 8))
    assert y.stride(0) == 0


def test_another_number_of_queries_loads_and_new_ones_differ_from_old() -> None:
    few, many = Queries(3, 8), Queries(5, 8)
    many.load_state_dict(few.state_dict())
    assert torch.equal(many.tokens[:, :3], few.tokens)
    assert torch.cdist(many.tokens[0, 3:], few.tokens[0]).min() > 0
    few.load_state_dict(many.state_dict())
    assert torch.equal(many.tokens[:, :3], few.tokens)


def test_slots_have_the_learned_mean_and_spread() -> None:
    slots = Slots(4000, 2)
    with torch.no_grad():
        slots.mean.copy_(torch.tensor([3.0, -1.0]))
        slots.log_sigma.copy_(torch.tensor([0.5, 2.0]).log())
    drawn = slots(torch.zeros(3, 1, 1), generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 4000, 2)
    torch.testing.assert_close(drawn.mean((0, 1)), torch.tensor([3.0, -1.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.std((0, 1)), torch.tensor([0.5, 2.0]), atol=0.05, rtol=0)
    assert not torch.equal(drawn[0], drawn[1])


def test_slot_logits_are_scaled_cosines() -> None:
    slots, x = SlotEmbeddings(3, 2, 8), torch.randn(2, 5, 8)
    with torch.no_grad():
        slots.scale.fill_(4.0)
    y = slots(x)
    wanted = 4 * torch.cosine_similarity(x[:, :, None, None], slots.slots[None, None], dim=-1)
    torch.testing.assert_close(y, wanted)
    with pytest.raises(ShapeError, match="one width"):
        slots(torch.zeros(2, 5, 7))
