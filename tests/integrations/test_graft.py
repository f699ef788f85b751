"""Grafts in real architectures: put in, trained, audited, saved, loaded into a fresh model."""

import copy
import pickle

import pytest
import torch
from tests.integrations.grafts import (
    COMPONENTS,
    FAMILIES,
    MORE,
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


@pytest.mark.parametrize(("component", "family"), [(c, f) for c in MORE for f in MORE[c][1]])
def test_so_do_further_components_in_some_families(family, component, tmp_path):
    trained_saved_and_loaded(family, component, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_any_family_is_copied_pickled_compiled_and_exported_with_its_graft(family):
    component = "Prompts" if expected(family, "Prompts") == "works" else "LowRankDelta"
    model, handle, x = grafted(family, component)
    with torch.no_grad():
        for param in handle.component.parameters():
            param.normal_(std=0.5)
        model.eval()
        out = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), out)
            assert [name for name, _ in other.named_parameters() if name.startswith("extra.")]
            for param in other.extra.parameters():
                param.normal_(std=0.5)
            assert not torch.equal(other(x), out)
            assert torch.equal(model(x), out), "the copies are independent"
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), out)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), out)
    torch._dynamo.reset()


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
