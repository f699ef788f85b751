import pytest
import torch
from torch import nn

import learnables as ln
from learnables.entries import entries
from learnables.policy.kinds import KINDS, kind_of


def hand_written(name: str, *shape: int) -> str:
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    kind = kind_of(entries(model)[0])
    return kind.name if not kind.decays else f"{kind.name} (decays)"


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("cls_token", (1, 1, 8), "token"),
        ("class_embedding", (8,), "token"),
        ("dist_token", (1, 1, 8), "token"),
        ("storage_tokens", (1, 4, 8), "token"),
        ("registers", (4, 8), "token"),
        ("masked_spec_embed", (8,), "token"),
        ("image_newline", (8,), "token"),
        ("pos_embed", (1, 5, 8), "position"),
        ("position_embeddings", (5, 8), "position"),
        ("pos_embed1", (2, 8, 8), "position"),
        ("rel_pos_h", (27, 8), "relative position"),
        ("relative_position_bias_table", (49, 2), "relative position"),
        ("attention_biases", (2, 49), "relative position"),
        ("prompt", (4, 8), "prompt"),
        ("prefix_keys", (2, 4, 8), "prompt"),
        ("mem_k", (2, 4, 8), "memory"),
        ("query_tokens", (1, 32, 8), "token"),
        ("queries", (32, 8), "query"),
        ("latents", (32, 8), "query"),
        ("slots_mu", (2, 8), "query"),
        ("level_embed", (3, 8), "marker"),
        ("sinks", (2,), "attention sink"),
        ("A_log", (8, 4), "state space"),
        ("scale_shift_table", (6, 8), "modulation table"),
        ("talking_heads_mix", (4, 4), "mixing"),
        ("color_matrix", (3, 3), "colour transform"),
        ("colour_weight", (3, 3), "colour transform"),
        ("lut", (3, 9, 9, 9), "colour transform"),
        ("gamma", (2, 8), "scale"),
        ("logit_scale", (), "scale"),
        ("temperature", (2, 1, 1), "scale"),
        ("layer_scale", (8, 1, 1), "scale"),
        ("freqs", (2, 4, 4), "frequency"),
        ("codebook", (16, 8), "codebook"),
        ("rel_pos_w", (27, 8), "relative position"),
        ("height_rel", (23, 32), "relative position"),
        ("compress_ape", (16, 8), "position"),
        ("seg_embed", (2, 4, 8), "marker"),
        ("D", (2, 8), "state space"),
        ("pad_up", (1, 4, 3, 8, 8), "broadcast"),
        ("w_g", (8, 1), "broadcast"),
        ("q_bias", (8,), "bias"),
        ("bias_u", (4, 8), "bias"),
        ("anything", (8,), "vector"),
        ("anything", (1, 8, 1), "broadcast"),
        ("weight", (8, 8), "matrix (decays)"),
        ("w1", (8, 8), "matrix (decays)"),
        ("gate_up_proj", (4, 8, 16), "matrix (decays)"),
        ("query_weight", (8, 8), "matrix (decays)"),
        ("experts", (4, 8, 8), "matrix (decays)"),
        ("proj", (8, 8), "matrix (decays)"),
        ("lora_A", (1, 8), "low-rank factor (decays)"),
    ],
)
def test_a_handwritten_parameter_is_recognised(name: str, shape: tuple, kind: str) -> None:
    assert hand_written(name, *shape) == kind


def decayed(module: nn.Module) -> set[str]:
    return {plan.name for plan in ln.inventory(module) if plan.weight_decay is True}


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (nn.Linear(4, 1), {"weight"}),
        (nn.Conv2d(4, 4, 3, groups=4), {"weight"}),
        (nn.ConvTranspose1d(4, 4, 3), {"weight"}),
        (nn.BatchNorm2d(4), set()),
        (nn.GroupNorm(2, 4), set()),
        (nn.PReLU(4), set()),
        (nn.Embedding(4, 4), {"weight"}),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), {"in_proj_weight", "out_proj.weight"}),
        (nn.LSTM(4, 4), {"weight_ih_l0", "weight_hh_l0"}),
        (nn.ParameterList([nn.Parameter(torch.zeros(4, 4))]), {"0"}),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_torchs_own_modules(module: nn.Module, wanted: set[str]) -> None:
    assert decayed(module) == wanted


def test_an_embedding_is_what_its_module_is_called() -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(4, 4), "pos_embed": nn.Embedding(4, 4)})
    assert decayed(model) == {"wte.weight"}


def test_a_list_of_prompts_is_named_by_its_list() -> None:
    model = nn.Module()
    model.prompts = nn.ParameterList([nn.Parameter(torch.zeros(4, 8)) for _ in range(2)])
    assert decayed(model) == set()


def test_our_own_components_are_recognised() -> None:
    model = nn.ModuleDict({"positions": ln.nn.Positions2d(2, 4), "color": ln.nn.ColorMatrix(3)})
    kinds = {plan.name: plan.kind.name for plan in ln.inventory(model)}
    assert kinds["positions.table"] == "position"
    assert kinds["color.matrix"] == "colour transform"


def test_a_name_that_says_nothing_is_what_its_module_is_called() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5, 8))

    model = nn.ModuleDict({"position_embedding": Table(), "query": Table(), "pos_proj": Table()})
    assert decayed(model) == {"query.weight", "pos_proj.weight"}


def test_the_magnitude_of_weight_norm_is_a_vector_and_its_direction_a_matrix() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
    assert decayed(layer) == {"parametrizations.weight.original1"}


def test_a_parametrized_weight_is_still_a_weight() -> None:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    assert decayed(layer) == {"parametrizations.weight.original"}


def test_every_kind_names_the_reference_it_follows() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert all(kind.follows for kind in KINDS)
