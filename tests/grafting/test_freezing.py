import copy
import pickle

import pytest
import torch
from tests.gloo import one_process_group
from torch import nn

import learnables as ln
from learnables.errors import LearnablesError, SelectionError
from learnables.grafting import unfreeze


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.again = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.again(self.drop(self.norm(self.conv(x)).relu()))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.backbone(x).mean((2, 3))))


def train(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 7, 7)).square().mean().backward()
        optimizer.step()
    return optimizer


def changed(model, before):
    after = model.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("stays", ["statistics", "eval"])
def test_nothing_of_a_frozen_backbone_moves(stays):
    model = Net()
    ln.freeze(model, "backbone.*", stays=stays)
    before = copy.deepcopy(model.state_dict())
    train(model)
    moved = changed(model, before)
    assert moved
    assert not any(name.startswith("backbone.") for name in moved)
    assert "norm.running_mean" in moved


def test_without_it_the_statistics_drift():
    model = Net()
    ln.freeze(model, "backbone.*", stays="nothing")
    before = copy.deepcopy(model.state_dict())
    train(model)
    assert "backbone.norm.running_mean" in changed(model, before)


def test_dropout_stays_on_unless_the_whole_is_in_evaluation_mode():
    model = Net()
    ln.freeze(model, "backbone.*")
    assert model.train().backbone.drop.training
    assert not model.backbone.norm.training
    ln.freeze(model, "backbone.*", stays="eval")
    assert not model.train().backbone.drop.training
    assert model.head.training


def test_a_layer_that_trains_in_part_keeps_its_mode():
    model = Net()
    ln.freeze(model, "backbone.norm.weight")
    assert model.train().backbone.norm.training


def test_train_only_freezes_everything_else_and_thaws_what_it_names():
    model = Net()
    ln.freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert ln.train_only(model, ["head.*", "norm.*"]) == (
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    )
    assert model.train().norm.training
    assert not model.backbone.norm.training
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }


def test_a_selector_that_picks_nothing_freezes_nothing():
    model = Net()
    with pytest.raises(SelectionError, match="picks no parameter"):
        ln.train_only(model, "prompts.*")
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(LearnablesError, match="no such way"):
        ln.freeze(model, stays="train")


def test_thawing_gives_the_mode_back():
    model = Net()
    ln.freeze(model, "backbone.*", stays="eval")
    assert "backbone.norm.weight" in unfreeze(model, "backbone.norm.*")
    assert model.train().backbone.norm.training
    assert "train" not in vars(model.backbone.norm)
    assert "train" not in vars(model.backbone)  # no longer frozen as a whole
    assert not model.backbone.conv.training


@pytest.mark.parametrize(
    "carried",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double().float()],
    ids=["deepcopy", "pickle", "to"],
)
def test_the_mode_survives_copies(carried):
    model = Net()
    ln.freeze(model, "backbone.*")
    other = carried(model)
    before = copy.deepcopy(other.state_dict())
    train(other)
    assert not any(name.startswith("backbone.") for name in changed(other, before))
    if other is not model:
        assert vars(other.backbone.norm)["train"].args[0] is other.backbone.norm


def test_compiled_and_wrapped_models_keep_it():
    model = Net()
    ln.freeze(model, "backbone.*")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = copy.deepcopy(model.state_dict())
    train(compiled)
    assert not any(name.startswith("backbone.") for name in changed(model, before))
    with one_process_group():
        wrapped = nn.parallel.DistributedDataParallel(model)
        train(wrapped)
    assert not any(name.startswith("backbone.") for name in changed(model, before))


def test_the_audit_confirms_it():
    model = Net()
    ln.train_only(model, ["head.*", "norm.*"])
    optimizer = torch.optim.SGD(ln.param_groups(model, lr=0.1, weight_decay=0.1))
    x = torch.randn(8, 3, 7, 7)

    def step():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    report = ln.audit(model, optimizer, step, intent=ln.Intent(frozen=["backbone.*"]))
    assert report.ok, report
    assert "LRN109" not in report.skipped
    model.backbone.conv.weight.requires_grad_(True)
    assert "LRN109" in ln.audit(model, intent=ln.Intent(frozen=["backbone.*"])).codes


def test_a_tied_parameter_is_frozen_by_either_name():
    model = nn.Module()
    model.embed, model.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    ln.tie(model, "out.weight", "embed.weight")
    ln.freeze(model, "out.*")
    assert not model.embed.weight.requires_grad


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.drop = ln.nn.LayerScale(4, 0.5), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.scale(x))


@pytest.mark.parametrize("stays", ["statistics", "eval"])
def test_what_is_grafted_into_a_frozen_model_trains_and_the_rest_stays(stays):
    """The model is frozen first; before, it held the component in evaluation mode, too."""
    model = Net()
    ln.freeze(model, stays=stays)
    held = {name for name, module in model.named_modules() if "train" in vars(module)}
    handle = ln.graft(model, "extra", Noisy(), "norm")
    assert model.train().extra.drop.training
    assert not model.backbone.norm.training
    assert model.backbone.drop.training == (stays == "statistics")
    before = copy.deepcopy(model.state_dict())
    train(model)
    assert changed(model, before) == {"extra.scale.gamma"}
    handle.remove()
    assert {name for name, module in model.named_modules() if "train" in vars(module)} == held
    assert model.train().training == (stays == "statistics")


def test_what_was_thawed_meanwhile_is_not_held_when_a_graft_goes():
    model = Net()
    ln.freeze(model, stays="eval")
    handle = ln.graft(model, "extra", Noisy(), "norm")
    unfreeze(model, "head.*")
    handle.remove()
    assert model.train().head.training
    assert not model.backbone.drop.training
