import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import learnables as ln
from learnables.errors import ShapeError
from learnables.models.vit import Block, ViT, ViTConfig

SMALL = ViTConfig(
    image_size=(8, 12), channels=3, classes=5, patch_size=4, dim=16, depth=2, heads=2, registers=2
)
VARIANTS = {
    "class token": {},
    "mean": {"pool": "mean"},
    "mean without registers": {"pool": "mean", "registers": 0},
    "conv stem": {"stem": "conv"},
    "layer scale": {"layer_scale": 0.1},
    "qk-norm": {"qk_norm": True},
    "drop path": {"drop_path": 0.5},
    "no colour matrix": {"color_matrix": False},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_parameter_of_every_variant_gets_a_gradient(changes):
    model = ViT(dataclasses.replace(SMALL, **changes))
    scores = model(torch.rand(6, 3, 8, 12))
    assert scores.shape == (6, 5)
    F.cross_entropy(scores, torch.arange(6) % 5).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(changes):
    model = ViT(dataclasses.replace(SMALL, **changes)).eval()
    x = torch.rand(4, 3, 8, 12)
    torch.testing.assert_close(model(x)[2], model(x[2:3])[0])


def test_forward_agrees_with_the_formulas_written_out():
    model = ViT(dataclasses.replace(SMALL, layer_scale=0.3)).eval()
    x = torch.rand(1, 3, 8, 12)
    pixels = (x - 0.5) / 0.5
    tokens = []
    for top in (0, 4):
        for left in (0, 4, 8):
            patch = pixels[0, :, top : top + 4, left : left + 4].reshape(-1)
            project = model.stem.project
            tokens.append(project.weight.flatten(1) @ patch + project.bias)
    z = torch.stack(tokens) + model.positions.table[0]
    z = torch.cat([model.class_token.tokens[0], model.registers.tokens[0], z])
    for block in model.blocks:
        n = block.norm1(z)
        q, k, v = (block.attention.qkv.weight @ n.T).T.split(16, dim=1)
        heads = []
        for h in (slice(0, 8), slice(8, 16)):
            weights = (q[:, h] @ k[:, h].T / 8**0.5).softmax(1)
            heads.append(weights @ v[:, h])
        z = z + 0.3 * block.attention.out(torch.cat(heads, dim=1))
        z = z + 0.3 * block.mlp(block.norm2(z))
    torch.testing.assert_close(model(x)[0], model.head(model.norm(z)[0]))


def test_mean_pooling_leaves_the_registers_out():
    model = ViT(dataclasses.replace(SMALL, pool="mean", depth=0)).eval()
    x = torch.rand(2, 3, 8, 12)
    before = model(x)
    model.registers.tokens.data.add_(100)  # without blocks, nothing else reads them
    torch.testing.assert_close(model(x), before)


def test_skipped_branches_keep_the_mean_and_evaluation_skips_none():
    block = Block(dataclasses.replace(SMALL, drop_path=0.4), index=1)
    branch = torch.ones(4000, 1, 1)
    dropped = block._dropped(branch)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    torch.testing.assert_close(dropped.mean(), torch.tensor(1.0), atol=0.05, rtol=0)
    assert block.eval()._dropped(branch) is branch


def test_model_of_another_image_size_loads_with_resampled_positions():
    small, large = ViT(SMALL), ViT(dataclasses.replace(SMALL, image_size=(16, 24)))
    large.load_state_dict(small.state_dict())
    assert large.positions.table.shape == (1, 24, 16)
    resized = ln.nn.Positions2d((4, 6), 16)
    resized.load_state_dict(small.positions.state_dict())
    torch.testing.assert_close(large.positions.table, resized.table)


def test_only_matrices_decay_and_the_colour_matrix_toward_the_identity():
    model = ViT(dataclasses.replace(SMALL, layer_scale=0.1, qk_norm=True))
    groups = ln.param_groups(model, lr=1e-3, weight_decay=0.05)
    decayed = {n for g in groups if g["weight_decay"] for n in g["param_names"]}
    linear = {
        f"{name}.weight"
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d))
    }
    assert decayed == linear
    toward = [n for g in groups if "decay_toward_init" in g for n in g["param_names"]]
    assert toward == ["color_matrix.matrix"]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"patch_size": 5}, "patches of 5×5"),
        ({"patch_size": 0}, "patches of 0×0"),
        ({"image_size": (12, 12), "patch_size": 3, "stem": "conv"}, "patch_size=3"),
        ({"heads": 3}, "dim=16, heads=3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, found):
    with pytest.raises(ShapeError, match=found):
        dataclasses.replace(SMALL, **changes)
