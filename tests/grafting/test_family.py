"""What is known of a model that no library made, and what is said where nothing is."""

import pytest
import torch
from tests.grafting.test_graft import Stack
from torch import nn

import learnables as ln
from learnables.errors import LearnablesError, SelectionError, ShapeError
from learnables.grafting.anatomy import Anatomy
from learnables.grafting.family import anatomy_of, known_in


class SelfAttention(nn.Module):
    pass


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(2)
    )


def test_a_convolutional_network_says_that_it_has_no_tokens():
    with pytest.raises(SelectionError, match=r"no sequence of tokens[\s\S]*2 convolutions"):
        ln.graft(convolutional(), "prompts", ln.nn.Prompts(3, 8))


class XCAttn(nn.Module):
    pass


@pytest.mark.parametrize("kind", [SelfAttention, XCAttn])
def test_a_convolution_beside_attention_makes_no_convolutional_network(kind):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), kind())
    with pytest.raises(SelectionError, match="no family of models"):
        anatomy_of(model)


def test_tokens_do_not_go_into_a_feature_map():
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


class Decoder(nn.Module):
    """Of somebody's own, with the arguments that decoders have: the mean of what is before."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.lengths = []

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids=None, inputs_embeds=None, past_key_values=None):
        x = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        self.lengths.append(x.shape[1])
        for layer in self.layers:
            x = layer(x.cumsum(1)).tanh()
        return x


def test_in_a_decoder_tokens_go_in_front_of_its_embedding_whoever_wrote_it():
    outer, ids = nn.Sequential(Decoder()), torch.tensor([[1, 2, 3]])
    model = outer[0]
    tokens = ln.nn.Prompts(2, 4, init=ln.init.normal(1.0))
    wanted = model(inputs_embeds=tokens(model.words(ids)))[:, 2:]
    handle = ln.graft(outer, "prompts", tokens, at="0.layers.*")
    torch.testing.assert_close(model(input_ids=ids), wanted)
    assert model.lengths == [5, 5], "its forward counts them"
    handle.remove()
    assert not torch.equal(model(input_ids=ids), wanted)
    with pytest.raises(LearnablesError, match=r"in front of all layers[\s\S]*at='0.layers.\*'"):
        ln.graft(outer, "prompts", tokens, at="0.layers.1")
    with pytest.raises(ShapeError, match=r"\(1, 2, 8\)[\s\S]*\(B, N, 4\)"):
        ln.graft(outer, "prompts", ln.nn.Prompts(2, 8), at="0.layers.*")
    assert not hasattr(outer, "prompts")


def test_what_lacks_one_of_the_arguments_is_no_decoder():
    class Encoder(Decoder):
        def forward(self, input_ids=None, inputs_embeds=None):
            return super().forward(input_ids, inputs_embeds)

    model, ids = Encoder(), torch.tensor([[1, 2, 3]])
    ln.graft(model, "prompts", ln.nn.Prompts(2, 4), at="layers.*")
    assert model(ids).shape == (1, 3, 4)
    assert model.lengths == [3], "put in behind the embedding, before the first layer"
