import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learnables.errors import LearnablesError
from learnables.models.vit import ViT, ViTConfig
from learnables.recipes.vit.augment import Augmentation
from learnables.recipes.vit.config import PRESETS, Config, choose, read_changes


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_survives_json(preset):
    config = choose(preset=preset)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_data_chooses_its_preset_and_a_folder_that_of_folders():
    assert choose("fashion-mnist").depth == PRESETS["fashion-mnist"]["depth"]
    assert choose("/some/photos") == dataclasses.replace(
        choose(preset="folder"), data="/some/photos"
    )
    assert choose("fashion-mnist", "fashion-mnist-gpu").precision == "bf16"
    assert choose() == Config()


@pytest.mark.parametrize(
    ("preset", "size", "most"),
    [("digits", 8, 140_000), ("fashion-mnist", 28, 200_000), ("fashion-mnist-gpu", 28, 1_000_000)],
)
def test_presets_keep_to_the_number_of_parameters_they_promise(preset, size, most):
    shape = {"image_size": (size, size), "channels": 1, "classes": 10}
    model = ViT(ViTConfig(**{**choose(preset=preset).part(ViTConfig), **shape}))
    assert sum(p.numel() for p in model.parameters()) <= most


def test_settings_of_model_and_augmentation_have_the_names_they_have_there():
    names = {f.name for f in dataclasses.fields(Config)}
    given_by_the_data = {"classes"}
    assert {f.name for f in dataclasses.fields(ViTConfig)} - given_by_the_data <= names
    assert {f.name for f in dataclasses.fields(Augmentation)} <= names


def test_docstring_says_something_about_every_setting_and_nothing_else():
    described = [line.strip() for line in Config.__doc__.splitlines()]
    described = [line.split(":")[0] for line in described if line[:1].islower() and ":" in line]
    assert [f.name for f in dataclasses.fields(Config)] == described


@given(
    dim=st.integers(1, 999),
    lr=st.floats(0, 1),
    flip=st.booleans(),
    scale=st.none() | st.floats(0, 1),
    pool=st.sampled_from(["class", "mean"]),
)
def test_settings_as_text_are_read_as_their_types(dim, lr, flip, scale, pool):
    values = {"dim": dim, "lr": lr, "flip": flip, "layer_scale": scale, "pool": pool}
    assert read_changes({name: str(value) for name, value in values.items()}) == values


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"dim": "many"}, "a whole number"),
        ({"dim": "0"}, "at least 1"),
        ({"lr": "-1"}, "at least 0"),
        ({"lr": "nan"}, "at least 0"),
        ({"pool": "max"}, "class, mean"),
        ({"flip": "perhaps"}, "true or false"),
        ({"layer_scale": "x"}, "a number or none"),
        ({"ema": "1"}, "less than 1"),
        ({"erase": "1.5"}, "from 0 to 1"),
        ({"epochs": 2.5}, "a whole number"),
        ({"dimm": "3"}, "dim"),
    ],
)
def test_setting_that_means_nothing_is_refused(changes, wanted):
    with pytest.raises(LearnablesError) as caught:
        choose(changes=changes)
    assert wanted in caught.value.wanted


def test_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(LearnablesError, match="one of digits, fashion-mnist"):
        choose(preset="cifar")


def test_settings_are_known_without_torch():
    code = "import sys, learnables.recipes.vit.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
