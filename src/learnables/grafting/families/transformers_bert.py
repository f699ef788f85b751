"""Text encoders of transformers: BERT, RoBERTa, XLM-RoBERTa, ELECTRA and DistilBERT."""

from torch import nn

from learnables.grafting.anatomy import Anatomy
from learnables.grafting.stack import encoder, model_type

_KINDS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")


def look(model: nn.Module) -> Anatomy | None:
    """The list of layers, behind the embeddings: positions of the text stay what they are.

    Masks of padding that the layers are given are widened for the new tokens.
    """
    if model_type(model) not in _KINDS or getattr(model.config, "is_decoder", False):
        return None
    return encoder(model, 1)
