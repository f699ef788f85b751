"""Masks and biases beside their definitions, entry by entry."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import learnables as ln
from learnables.errors import LearnablesError
from learnables.grafting.hooks import AddBias, Strip, Widen, mask_of

tokens = st.integers(2, 6)
counts = st.integers(1, 3)


def widen(first, count):
    return Widen(first, count, "attention_mask", 1)


@given(tokens, st.data(), counts, st.sampled_from(["bool", "long", "float", "added", "row"]))
def test_a_widened_mask_shows_the_new_tokens_and_hides_what_was_hidden(n, data, count, kind):
    first = data.draw(st.integers(0, n))
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    old = [i if i < first else i + count for i in range(n)]  # where the old tokens are now
    wanted = torch.ones(n + count, dtype=torch.bool)
    wanted[old] = keep
    if kind in ("long", "float"):
        mask = keep[None].to(getattr(torch, kind))  # (B, N)
        assert torch.equal(widen(first, count).wider(mask)[0].bool(), wanted)
        return
    whole = keep.expand(1, 1, 1 if kind == "row" else n, n)
    if kind == "added":
        whole = torch.zeros(whole.shape).masked_fill(~whole, -1e9)
    wide = widen(first, count).wider(whole)
    seen = wide == 0 if kind == "added" else wide
    assert seen.shape[-2:] == (1 if kind == "row" else n + count, n + count)
    assert all(torch.equal(row, wanted) for row in seen[0, 0])


@given(tokens, st.data(), counts)
def test_attention_with_tokens_put_in_ignores_what_was_masked(n, data, count):
    torch.manual_seed(n)
    first = data.draw(st.integers(0, n))
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    keep[0] = True
    x, put = torch.randn(1, n, 4), torch.randn(1, count, 4)

    def among(x):
        return torch.cat([x[:, :first], put, x[:, first:]], dim=1)

    mask = widen(first, count).wider(keep.expand(1, n, n))
    out = F.scaled_dot_product_attention(among(x), among(x), among(x), mask)
    other = torch.where(keep[:, None], x, torch.randn(1, n, 4))
    again = F.scaled_dot_product_attention(among(other), among(other), among(other), mask)
    seen = Strip(first, count).without(out)[:, keep]
    torch.testing.assert_close(seen, Strip(first, count).without(again)[:, keep])


@given(st.lists(st.tuples(st.integers(0, 4), counts), max_size=3))
def test_a_bias_skips_the_tokens_that_were_put_in(inserted):
    component = ln.nn.RelativeBias(2, 3, init=ln.init.normal(1.0))
    order: list[int | None] = [0, 1, 2, 3]  # which old token stands where
    for first, count in inserted:
        order[first:first] = [None] * count
    hook = AddBias(component, "bias", "attention_mask", 1, inserted)
    x = torch.zeros(2, len(order), 8)
    args, kwargs = hook(nn.Identity(), (x,), {})
    assert args == (x,)
    bias, wide = component.bias(), kwargs["attention_mask"]
    assert wide.shape == (1, 3, len(order), len(order))
    for row, i in enumerate(order):
        for column, j in enumerate(order):
            wanted = 0 if i is None or j is None else bias[:, i, j]
            assert torch.equal(wide[0, :, row, column], torch.zeros(3) + wanted)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_bias_is_added_to_the_mask_that_is_there(by_keyword):
    component = ln.nn.RelativeBias(2, 3, init=ln.init.normal(1.0))
    hook = AddBias(component, "bias", *mask_of(Own()))
    x, mask = torch.zeros(2, 4, 8), torch.randn(2, 1, 4, 4)
    told = ((x,), {"attn_mask": mask}) if by_keyword else ((x, mask), {})
    args, kwargs = hook(Own(), *told)
    wide = kwargs["attn_mask"] if by_keyword else args[1]
    assert torch.equal(wide, component.bias()[None] + mask)
    assert args[0] is x
    with pytest.raises(LearnablesError, match="visible or hidden"):
        hook(Own(), (x, mask > 0), {})


def test_a_mask_that_is_no_tensor_is_refused():
    with pytest.raises(LearnablesError, match=r"cannot be widened[\s\S]*object"):
        widen(0, 1)(nn.Identity(), (torch.zeros(1, 2, 3), object()), {})


class Own(nn.Module):
    def forward(self, x, attn_mask=None):
        return x


def test_booleans_that_may_mean_either_are_refused():
    hook = Widen(0, 1, *mask_of(Own()))
    mask = torch.ones(2, 2, dtype=torch.bool)[None]
    with pytest.raises(LearnablesError, match="visible or hidden"):
        hook(Own(), (torch.zeros(1, 2, 3),), {"attn_mask": mask})
    _, kwargs = hook(Own(), (torch.zeros(1, 2, 3),), {"attn_mask": torch.zeros(1, 2, 2)})
    assert kwargs["attn_mask"].shape == (1, 3, 3)
    assert mask_of(nn.MultiheadAttention(2, 1)) is None


# --- between the blocks --------------------------------------------------------------------------


class Mixing(nn.Module):
    """Each token becomes the mean of all, plus itself."""

    def forward(self, x):
        return x + x.mean(1, keepdim=True)


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Mixing() for _ in range(3))

    def between(self, x, most=3):
        found = []
        for block in self.blocks[:most]:
            x = block(x)
            found.append(x)
        return found


class Pyramid(Stacked):
    """Hands out what is between its blocks as timm's models do: by a method."""

    grad_checkpointing = False

    def forward(self, x):
        return self.between(x)[-1]

    def forward_intermediates(self, x, most=3):
        return self.between(x, most)


class Stated(Stacked):
    """The same as transformers' models do: by a keyword or a setting."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(output_hidden_states=False)

    def forward(self, x, output_hidden_states=None):
        found = self.between(x)
        asked = self.config.output_hidden_states if output_hidden_states is None else True
        return (found[-1], (x, *found)) if asked else found[-1]


X = torch.arange(12.0).view(1, 3, 4)
TOKENS = [ln.nn.RegisterTokens(2, 4), ln.nn.Prompts(1, 4, prefix=3, init=ln.init.normal(1.0))]


def by_hand():
    """Both put in before the first block; after each block what is left without them."""
    x, found = TOKENS[1](TOKENS[0](X)), []
    for block in Stacked().blocks:
        x = block(x)
        found.append(torch.cat([x[:, 2:3], x[:, 4:]], dim=1))
    return found


def grafted(kind):
    model = kind()
    return model, [ln.graft(model, f"g{i}", made, "blocks.*") for i, made in enumerate(TOKENS)]


@torch.no_grad()
def test_what_is_between_blocks_is_handed_out_without_the_tokens_by_a_method():
    model, handles = grafted(Pyramid)
    before = vars(Pyramid()).keys()
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(one.forward_intermediates(X), by_hand())
        torch.testing.assert_close(one.forward_intermediates(X, most=2), by_hand()[:2])
        torch.testing.assert_close(one(X), by_hand()[-1])
    handles[1].remove()
    assert model.forward_intermediates(X)[0].shape == X.shape
    handles[0].remove()
    assert vars(model).keys() == before
    assert torch.equal(model.forward_intermediates(X)[-1], Pyramid()(X))


@torch.no_grad()
@pytest.mark.parametrize("asked", ["keyword", "setting"])
def test_what_is_between_blocks_is_handed_out_without_the_tokens_by_a_keyword(asked):
    model, _ = grafted(Stated)
    model.config.output_hidden_states = asked == "setting"
    told = {"output_hidden_states": True} if asked == "keyword" else {}
    last, states = model(X, **told)
    torch.testing.assert_close(list(states), [X, *by_hand()])
    torch.testing.assert_close(last, by_hand()[-1])
    model.config.output_hidden_states = False
    torch.testing.assert_close(model(X), by_hand()[-1])


def test_with_blocks_that_are_computed_again_a_look_is_refused_where_gradients_are():
    model, _ = grafted(Pyramid)
    model.grad_checkpointing = True
    with pytest.raises(LearnablesError, match="between checkpointed blocks"):
        model.forward_intermediates(X)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_intermediates(X), by_hand())


def test_a_look_that_fails_or_ends_early_leaves_nothing_for_the_next_call():
    model, _ = grafted(Pyramid)
    with torch.no_grad():
        assert len(model.forward_intermediates(X, most=1)) == 1
        torch.testing.assert_close(model(X), by_hand()[-1])
        with pytest.raises(TypeError):
            model.forward_intermediates(X, most="all")
        handle = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # while the tokens wait
            model.forward_intermediates(X)
        handle.remove()
        torch.testing.assert_close(model(X), by_hand()[-1])
        torch.testing.assert_close(model.forward_intermediates(X), by_hand())
