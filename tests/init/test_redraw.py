import torch
from torch import nn

import learnables as ln
from learnables.entries import entries


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.color = ln.nn.ColorMatrix(3)
        self.scale = ln.parameter(4, init=ln.init.constant(2.0), weight_decay="init")
        self.drawn = ln.parameter(64, init=ln.init.trunc_normal(0.02))
        self.plain = nn.Parameter(torch.full((2,), 7.0))


def test_values_after_meta_and_to_empty_are_the_declared_ones() -> None:
    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(float("nan"))
    drawn = ln.init.reset_(model)
    assert [entry.name for entry in drawn] == ["scale", "drawn", "color.matrix", "color.bias"]
    assert torch.equal(model.color.matrix, torch.eye(3))
    assert torch.equal(model.scale, torch.full((4,), 2.0))
    assert 0 < model.drawn.abs().max() <= 0.04
    assert model.plain.isnan().all()


def test_the_value_to_decay_toward_is_refreshed() -> None:
    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    ln.init.reset_(model)
    initial = {e.name: e.initial for e in entries(model) if e.initial is not None}
    assert torch.equal(initial["color.matrix"], torch.eye(3))
    assert initial["scale"].device.type == "cpu"


def test_one_generator_gives_one_result() -> None:
    model, values = Model(), []
    for _ in range(2):
        ln.init.reset_(model, "drawn", generator=torch.Generator().manual_seed(3))
        values.append(model.drawn.detach().clone())
    assert torch.equal(*values)


def test_reset_parameters_of_a_component_does_the_same_for_its_own() -> None:
    scale = ln.nn.LayerScale(3, 0.5)
    with torch.no_grad():
        scale.gamma.zero_()
    scale.reset_parameters()
    assert torch.equal(scale.gamma, torch.full((3,), 0.5))


def test_the_default_initialiser_is_noted_so_that_it_can_be_drawn_again() -> None:
    with torch.device("meta"):
        model = nn.Module()
        model.drawn, model.scalar, model.empty = ln.parameter(50), ln.parameter(), ln.parameter(())
    model.to_empty(device="cpu")
    ln.init.reset_(model)
    assert 0 < model.drawn.abs().max() <= 0.04
    assert model.scalar.tolist() == model.empty.tolist() == [0.0]
