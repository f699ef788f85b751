"""Grafts in real architectures: put in, trained, audited, saved, loaded into a fresh model."""

import pytest
import torch
from tests.integrations.grafts import (
    COMPONENTS,
    FAMILIES,
    expected,
    grafted,
    graph_breaks,
    trained_saved_and_loaded,
)

from learnables.errors import LearnablesError

COMBINATIONS = [(f, c) for f in FAMILIES for c in COMPONENTS if expected(f, c) == "works"]
REFUSED = [(f, c) for f in FAMILIES for c in COMPONENTS if expected(f, c) == "refused"]


@pytest.mark.parametrize(("family", "component"), COMBINATIONS)
def test_trained_audited_saved_and_loaded_bit_equal(family, component, tmp_path):
    trained_saved_and_loaded(family, component, tmp_path)


@pytest.mark.parametrize(("family", "component"), REFUSED)
def test_what_a_family_cannot_take_is_refused_with_the_reason(family, component):
    with pytest.raises(LearnablesError, match=r"no sequence|no further tokens|no attention"):
        grafted(family, component)


def test_there_are_enough_combinations():
    assert len(COMBINATIONS) >= 60


@pytest.mark.parametrize(
    ("family", "component"),
    [*(("ViT", component) for component in COMPONENTS), ("Llama", "Prompts"), ("BERT", "Prompts")],
)
def test_no_graft_adds_a_graph_break(family, component):
    assert graph_breaks(family, component) == 0
    torch._dynamo.reset()
