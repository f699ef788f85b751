"""What others' checkpoints leave out is kept beside them: by DCP on two ranks, and alone."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.launch.session import outcomes
from tests.runtime.test_sharded import built, same, train, wholes
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import learnables as ln
from learnables.errors import CheckpointError
from learnables.runtime.declared import Declared

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def whole_training(model, optimizer):
    names, moments = get_state_dict(model, optimizer)
    return {"model": names, "optimizer": moments, "declared": Declared(model, optimizer)}


def those_who_stay_with_dcp_go_on_bit_equal(folder):
    model, optimizer = built()
    train(model, optimizer)
    dcp.save(whole_training(model, optimizer), checkpoint_id=folder / "dcp")
    again, optimizer_again = built(seed=1)
    with torch.no_grad():
        again.colour.add_(1)
    ln.annotate(again, "colour", weight_decay="init")
    held = whole_training(again, optimizer_again)
    dcp.load(held, checkpoint_id=folder / "dcp")
    set_state_dict(
        again,
        optimizer_again,
        model_state_dict=held["model"],
        optim_state_dict=held["optimizer"],
    )
    train(model, optimizer)
    train(again, optimizer_again)
    same(wholes(model, optimizer), wholes(again, optimizer_again))


def test_dcp_on_two_ranks(tmp_path):
    check = those_who_stay_with_dcp_go_on_bit_equal
    for rank, trace in enumerate(outcomes([check], 2, tmp_path)[check.__name__]):
        assert not trace, f"rank {rank}: {trace}"


def colours(seed):
    """A model that decays toward its own random colours."""
    torch.manual_seed(seed)
    model = nn.Module()
    model.colour = ln.parameter(torch.rand(3, 3), weight_decay="init")
    model.kernel = ln.parameter(4, 3, 3, 3, memory_format=torch.channels_last)
    groups = ln.param_groups(model, lr=0.1, weight_decay=0.5)
    optimizer = torch.optim.AdamW(groups, fused=True)
    ln.attach(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    places = torch.arange(108.0).reshape(4, 3, 3, 3)
    (model.colour.square().sum() + (model.kernel - places).square().sum()).backward()
    optimizer.step()


def test_by_hand_it_restores_what_is_decayed_toward_and_the_strides_of_the_state():
    model, optimizer = colours(0)
    step(model, optimizer)
    saved = Declared(model, optimizer).state_dict()
    moments = copy.deepcopy(optimizer.state_dict())  # else it is the live state
    for state in moments["state"].values():  # as a file lays them out that knows no strides
        state.update({k: x.contiguous() for k, x in state.items() if isinstance(x, torch.Tensor)})
    again, optimizer_again = colours(1)
    again.load_state_dict(model.state_dict())
    optimizer_again.load_state_dict(moments)
    declared = Declared(again, optimizer_again)
    declared.load_state_dict(saved)
    assert declared.changed == ()
    step(model, optimizer)
    step(again, optimizer_again)
    same(dict(model.state_dict()), dict(again.state_dict()))


def test_what_is_declared_otherwise_is_said():
    model, optimizer = colours(0)
    saved = Declared(model, optimizer).state_dict()
    ln.annotate(model, "colour", lr_scale=2.0)
    declared = Declared(model, optimizer)
    declared.load_state_dict(saved)
    assert declared.changed == ("colour: lr_scale was not declared, is 2.0",)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["initial"].pop("colour"),
        lambda state: state["initial"].update(colour=torch.zeros(2, 2)),
        lambda state: state["initial"].update(other=torch.zeros(3, 3)),
        lambda state: state.pop("initial"),
        lambda state: state.update(policy="{"),
    ],
)
def test_the_state_of_something_else_is_refused_and_changes_nothing(change):
    model, optimizer = colours(0)
    before = Declared(model, optimizer).state_dict()
    state = Declared(*colours(1)).state_dict()
    change(state)
    with pytest.raises(CheckpointError):
        Declared(model, optimizer).load_state_dict(state)
    after = Declared(model, optimizer).state_dict()
    same(before["initial"], after["initial"])
