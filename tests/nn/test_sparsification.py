import copy

import pytest
import torch
from torch import nn

import learnables as ln
from learnables.errors import LayoutError, SelectionError, ShapeError


def a_model():
    return nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 5))
    )


def test_selected_linears_become_block_sparse_and_keep_their_largest_blocks() -> None:
    model = a_model()
    before = copy.deepcopy(model)
    made = ln.sparsify(model, ["*.weight", "!2.1.*"], block=8, density=0.5)
    assert list(made) == ["0", "2.0"]
    assert made["2.0"] is model[2][0]
    assert type(model[2][1]) is nn.Linear
    for name, layer in made.items():
        old = before.get_submodule(name)
        assert layer.density == 0.5
        stored = layer.dense() != 0
        assert torch.equal(layer.dense(), old.weight * stored)
        assert torch.equal(layer.bias, old.bias)
        assert (old.weight * stored).norm() > 0.5**0.5 * old.weight.norm()


def test_drawn_anew_the_output_keeps_its_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    x = torch.randn(500, 256)
    wanted = model(x).std().item()
    ln.sparsify(model, "*", block=16, density=0.1, mask="random", draw=True)
    assert model(x).std().item() == pytest.approx(wanted, rel=0.1)


def test_what_was_said_and_what_trains_goes_over() -> None:
    model = a_model()
    ln.annotate(model, "0.weight", lr_scale=0.5)
    model[0].bias.requires_grad_(False)
    model.eval()
    ln.sparsify(model, "0.*", block=8)
    plan = ln.inventory(model)["0.weight"]
    assert plan["lr_scale"] == 0.5
    assert not model[0].bias.requires_grad
    assert model[0].weight.requires_grad
    assert not model[0].training


def test_transformer_layers_still_infer() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    made = ln.sparsify(model, "*", block=16, density=1.0)
    assert [name.rpartition(".")[2] for name in made] == ["linear1", "linear2"] * 2
    x = torch.randn(2, 5, 32)
    trained = model(x)
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), trained)


@pytest.mark.parametrize(
    ("selector", "options", "error", "says"),
    [
        ("*.gamma", {}, SelectionError, "picks no parameter"),
        ("*.bias", {}, SelectionError, "no weight of an nn.Linear"),
        ("*", {"block": 8}, LayoutError, r"where: 2\.1\.weight.*found: block \(8, 8\)"),
        ("0.*", {"density": 0.0}, LayoutError, "density=0.0"),
        ("0.*", {"mask": "diagonal"}, LayoutError, "mask='diagonal'"),
        ("0.*", {"block": 8, "mask": torch.ones(3, 3)}, ShapeError, r"where: 0\.weight.*\(3, 3\)"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_changed(
    selector, options, error, says
) -> None:
    model = a_model()
    before = list(model.modules())
    with pytest.raises(error, match=f"(?s){says}"):
        ln.sparsify(model, selector, **{"block": 16, **options})
    assert list(model.modules()) == before


def test_a_tied_weight_and_the_model_itself_are_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    with pytest.raises(SelectionError, match=r"where: 0\.weight, 1\.weight"):
        ln.sparsify(model, "*", block=8)
    with pytest.raises(SelectionError, match="inside the model"):
        ln.sparsify(nn.Linear(32, 32), "*", block=8)
