"""What is known of a model that no library made, and what is said where nothing is."""

import pytest
from tests.grafting.test_graft import Stack
from torch import nn

import learnables as ln
from learnables.errors import LearnablesError, SelectionError
from learnables.grafting.anatomy import Anatomy
from learnables.grafting.family import anatomy_of, known_in


class SelfAttention(nn.Module):
    pass


def convolutional():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))


def test_a_convolutional_network_says_that_it_has_no_tokens():
    with pytest.raises(SelectionError, match=r"no sequence of tokens[\s\S]*2 convolutions"):
        ln.graft(convolutional(), "prompts", ln.nn.Prompts(3, 8))


def test_a_convolution_beside_attention_makes_no_convolutional_network():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SelfAttention())
    with pytest.raises(SelectionError, match="no family of models"):
        anatomy_of(model)


def test_tokens_do_not_go_into_a_feature_map():
    import torch

    model = convolutional()
    ln.graft(model, "prompts", ln.nn.Prompts(3, 8), at="3")
    with pytest.raises(LearnablesError, match=r"sequence of tokens only[\s\S]*\(2, 8, 6, 6\)"):
        model(torch.randn(2, 3, 8, 8))


def test_of_a_model_of_ones_own_nothing_is_known_and_its_stacks_are_offered():
    assert list(known_in(Stack())) == []
    with pytest.raises(SelectionError, match=r"at='blocks\.\*'"):
        anatomy_of(Stack())


def test_an_anatomy_moves_with_its_model():
    vision = Anatomy("blocks", 8, 1, "blocks.*.attn")
    assert vision.inside("") is vision
    moved = vision.inside("body.0")
    assert (moved.blocks, moved.attention) == ("body.0.blocks", "body.0.blocks.*.attn")
    assert (moved.entrance, moved.embedding) == (None, "")
    text = Anatomy("layers", 8, entrance="", embedding="embed_tokens").inside("model")
    assert (text.entrance, text.embedding) == ("model", "model.embed_tokens")
