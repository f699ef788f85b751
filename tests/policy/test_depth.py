"""`ln.param_groups(layer_decay=…)`: which block a parameter belongs to, and its learning rate."""

import pytest
import torch
from torch import nn

import learnables as ln
from learnables.errors import PolicyError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        self.gamma = nn.Parameter(torch.ones(4))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.patches = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


def rates(model: nn.Module, **options: float) -> dict[str, float]:
    groups = ln.param_groups(model, lr=1.0, **options)
    return {name: group["lr"] for group in groups for name in group["param_names"]}


def test_rates_fall_from_block_to_block_toward_the_input() -> None:
    found = rates(Net(), layer_decay=0.5)
    assert found["head.weight"] == found["norm.bias"] == found["logit_scale"] == 1.0
    for block, rate in enumerate((0.125, 0.25, 0.5)):
        for name in ("mlp.0.weight", "mlp.2.bias", "gamma"):
            assert found[f"blocks.{block}.{name}"] == rate
    assert found["cls_token"] == found["patches.weight"] == 0.0625


def test_a_parameter_put_on_the_stack_is_an_input_and_a_wrapper_changes_nothing() -> None:
    model = Net()
    model.blocks.register_parameter("prompt", nn.Parameter(torch.zeros(1, 2, 4)))
    plain = rates(model, layer_decay=0.5)
    assert plain["blocks.prompt"] == 0.0625
    wrapped = rates(nn.parallel.DataParallel(model), layer_decay=0.5)
    assert {name.removeprefix("module."): rate for name, rate in wrapped.items()} == plain


def test_a_declared_scale_multiplies_and_stacks_in_stacks_count() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    model = nn.Module()
    model.stages = nn.ModuleList([Stage(), Stage()])
    model.head = nn.Linear(4, 2)
    ln.annotate(model, "head.bias", lr_scale=10.0)
    found = rates(model, layer_decay=0.5)
    order = [found[f"stages.{i}.blocks.{j}.weight"] for i in range(2) for j in range(2)]
    assert order == [0.0625, 0.125, 0.25, 0.5]
    assert found["head.bias"] == 10.0


def test_what_lies_between_two_stages_has_the_depth_of_the_former() -> None:
    model = nn.Module()
    model.stage1 = nn.Module()
    model.stage1.b1, model.stage1.b2 = nn.Linear(4, 4), nn.Linear(4, 4)
    model.down = nn.Linear(4, 4)
    model.stage2 = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.head = nn.Linear(4, 2)
    found = rates(model, layer_decay=0.5)
    names = ("stage1.b1", "stage1.b2", "down", "stage2.0", "stage2.1", "head")
    order = [found[f"{name}.weight"] for name in names]
    assert order == [0.0625, 0.125, 0.125, 0.25, 0.5, 1.0]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(PolicyError, match="stacked blocks"):
        ln.param_groups(nn.Linear(4, 4), lr=1.0, layer_decay=0.5)


@pytest.mark.parametrize("options", [{"lr": None, "layer_decay": 0.5}, {"layer_decay": 1.5}])
def test_a_decay_that_means_nothing_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(PolicyError, match="layer-wise decay"):
        ln.param_groups(Net(), **{"lr": 1.0, **options})
