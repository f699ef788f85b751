"""Containers that run whatever is registered in them do not run what was grafted."""

import copy
import pickle

import pytest
import torch
from tests.gloo import one_process_group
from torch import nn
from torch.distributed.fsdp import fully_shard

import learnables as ln


class Listed(nn.ModuleList):
    """A list that has a forward."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return self[-1](x)


def layers():
    torch.manual_seed(0)
    return [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)]


def built(kind):
    return Listed(layers()) if kind is Listed else nn.Sequential(*layers())


def grafted(kind):
    model = built(kind)
    return model, ln.graft(model, "scale", ln.nn.LayerScale(4, 0.5), at="0")


X = torch.linspace(-1, 1, 8).view(2, 4)
KINDS = pytest.mark.parametrize("kind", [nn.Sequential, Listed])


@KINDS
def test_a_component_acts_once_and_is_no_layer(kind):
    plain, (model, handle) = built(kind), grafted(kind)
    with torch.no_grad():
        plain[0].weight.mul_(0.5), plain[0].bias.mul_(0.5)
    torch.testing.assert_close(model(X), plain(X))
    assert len(model) == 3
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert model[-1] is model.get_submodule("2")
    assert [type(layer) for layer in model[1:]] == [nn.Tanh, nn.Linear]
    assert "scale.gamma" in model.state_dict()
    assert "scale" in dict(model.named_modules())
    handle.remove()
    assert type(model) is kind
    assert torch.equal(model(X), built(kind)(X))
    assert model.__dict__.keys() == built(kind).__dict__.keys()


@KINDS
def test_a_layer_that_is_appended_later_is_run(kind):
    model, _ = grafted(kind)
    model.append(nn.Linear(4, 1))
    assert model[-1].out_features == 1
    assert len(list(model)) == 4


@KINDS
@pytest.mark.parametrize("carried", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_run_what_the_model_runs(kind, carried):
    model, _ = grafted(kind)
    assert torch.equal(carried(model)(X), model(X))


def test_of_two_components_neither_is_run():
    model, first = grafted(nn.Sequential)
    wanted = model(X)
    second = ln.graft(model, "more", ln.nn.LayerScale(4, 2.0), at="2")
    torch.testing.assert_close(model(X), 2 * wanted)
    second.remove()
    assert torch.equal(model(X), wanted)
    first.remove()
    assert type(model) is nn.Sequential


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at each input's
def test_compiled_exported_and_sharded_models_run_the_same():
    model, _ = grafted(nn.Sequential)
    wanted = model(X)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(X), wanted)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), wanted)
    with one_process_group():
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        torch.testing.assert_close(model(X), wanted)
