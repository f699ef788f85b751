"""timm's optimizers over our groups; layer-wise decay beside timm's own."""

import pytest
import torch
from torch import nn

import learnables as ln
from learnables.grafting import unfreeze

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 10}


def vit(**options: object) -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", depth=3, **SMALL, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"reg_tokens": 2, "init_values": 1e-4}, {"class_token": False, "global_pool": "avg"}],
)
def test_layer_decay_is_that_of_timm_for_a_vit(options: dict[str, object]) -> None:
    from timm.optim import create_optimizer_v2

    model = vit(**options)
    theirs = create_optimizer_v2(model, opt="sgd", lr=1.0, weight_decay=0.1, layer_decay=0.75)
    wanted = {id(p): g["lr_scale"] for g in theirs.param_groups for p in g["params"]}
    groups = ln.param_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.75)
    found = {id(p): g["lr"] for g in groups for p in g["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    different = {names[i]: (found[i], wanted[i]) for i in wanted if found[i] != wanted[i]}
    # timm puts the last norm to the last block; BEiT and MAE, as we, to the head.
    assert set(different) <= {"norm.weight", "norm.bias"}, different


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_distilled_patch16_224",
        "beit_base_patch16_224",
        "swin_tiny_patch4_window7_224",
        "convnext_atto",
        "resnet18",
        "regnety_002",
        "efficientnet_b0",
        "mobilevit_xxs",
        "levit_128s",
        "mixer_s32_224",
        "hiera_tiny_224",
        "volo_d1_224",
    ],
)
def test_no_parameter_lies_deeper_than_another_where_timm_says_the_opposite(name: str) -> None:
    import timm
    from timm.optim import create_optimizer_v2

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    theirs = create_optimizer_v2(model, opt="sgd", lr=1.0, weight_decay=0.0, layer_decay=0.5)
    wanted = {id(p): g["lr_scale"] for g in theirs.param_groups for p in g["params"]}
    groups = ln.param_groups(model, lr=1.0, layer_decay=0.5)
    found = {id(p): g["lr"] for g in groups for p in g["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    pairs = ((a, b) for a in wanted for b in wanted if wanted[a] < wanted[b])
    assert not [(names[a], names[b]) for a, b in pairs if found[a] > found[b]]


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb", "lion", "nadamw", "adopt"])
def test_any_optimizer_of_timm_over_our_groups(opt: str) -> None:
    from learnables.integrations.timm import create_optimizer

    model = nn.Sequential(vit())  # a wrapper, under which timm decays tokens
    optimizer = create_optimizer(model, opt, lr=1e-3, weight_decay=0.05)
    decay = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    assert decay["0.cls_token"] == decay["0.pos_embed"] == decay["0.norm.weight"] == 0.0
    assert decay["0.blocks.0.attn.qkv.weight"] == 0.05

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4))
        loss.backward()
        optimizer.step()
        return loss

    report = ln.audit(model, optimizer, step, steps=2)
    assert report.ok, report


def test_timms_scheduler_keeps_the_ratios_of_layer_decay() -> None:
    from timm.scheduler import CosineLRScheduler

    from learnables.integrations.timm import create_optimizer

    optimizer = create_optimizer(vit(), "adamw", lr=1e-3, layer_decay=0.5)
    scheduler = CosineLRScheduler(optimizer, t_initial=10)
    before = torch.tensor([group["lr"] for group in optimizer.param_groups])
    scheduler.step(5)
    after = torch.tensor([group["lr"] for group in optimizer.param_groups])
    assert after.max() < before.max()
    torch.testing.assert_close(after / after.max(), before / before.max())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["vit", "resnet18", "convnext_atto", "efficientnet_b0"])
def test_no_layout_rule_accuses_a_model_of_timm(name: str, channels_last: bool) -> None:
    import timm

    torch.manual_seed(0)
    model = vit() if name == "vit" else timm.create_model(name, num_classes=10)
    images = torch.randn(2, 3, 32, 32)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    report = ln.audit(model, optimizer, step, steps=2, select=["LRN601", "LRN602", "LRN62"])
    assert report.findings == []
    assert not [code for code in report.skipped if code.startswith("LRN62")]


@pytest.mark.parametrize("keep", ["v2", "v3", "v3 one by one"])
@pytest.mark.parametrize("wide", [False, True], ids=["bfloat16", "float32"])
def test_an_average_of_timm_that_rounds_away_is_found_and_in_float32_it_is_not(
    keep: str, wide: bool
) -> None:
    from timm.utils import ModelEmaV2, ModelEmaV3

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if keep == "v2":
        average = ModelEmaV2(model, decay=0.999)
    else:
        average = ModelEmaV3(model, decay=0.999, foreach=keep == "v3")
    if wide:
        average.float()
    x = torch.randn(8, 4).bfloat16()

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x).float() + 1).square().mean()
        loss.backward()
        optimizer.step()
        average.update(model)
        return loss

    report = ln.audit(model, optimizer, step)
    assert ("LRN642" in report.codes) is not wide, report
    assert not wide or not report.findings, report


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_of_a_frozen_network_no_parameter_and_no_statistic_moves(name: str) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    ln.train_only(model, ["fc.*"] if name == "resnet18" else ["classifier.*"])
    optimizer = torch.optim.SGD(ln.param_groups(model, lr=0.1))
    images, labels = torch.randn(4, 3, 32, 32) + 3, torch.arange(4)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.train()(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(2):
        step()
    after = model.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert {key.split(".")[0] for key in moved} == {"fc" if name == "resnet18" else "classifier"}
    report = ln.audit(model, optimizer, step, steps=2)
    assert report.ok, report
    assert "LRN711" not in report.codes
    unfreeze(model)
    model.requires_grad_(False)  # alone it does not hold what averages
    model.get_classifier().requires_grad_(True)
    step()
    after = model.state_dict()
    assert any("running" in key for key in before if not torch.equal(before[key], after[key]))
