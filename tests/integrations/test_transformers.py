"""The Trainer with our callback and groups; parameters of ours through transformers' files."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import learnables as ln
from learnables.errors import CheckpointError
from learnables.watching import Run


def config() -> Any:
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )


def kind(*, safe: bool = True) -> Any:
    from transformers import ViTForImageClassification

    from learnables.integrations.transformers import Declared

    parents = (Declared, ViTForImageClassification) if safe else (ViTForImageClassification,)

    class NetForImageClassification(*parents):  # its name chooses the loss
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.prompt = ln.parameter(1, 4, 24, init=ln.init.constant(0.5))
            self.colour = ln.parameter(torch.eye(3), weight_decay="init")
            self.plain = nn.Parameter(torch.full((24,), 1e-4))
            self.my_gamma = nn.Parameter(torch.full((24,), 2.0))
            self.layers_scale = nn.ParameterList([nn.Parameter(torch.full((4,), 3.0))] * 1)
            self.mixing = nn.Linear(4, 4)
            self.post_init()

        def forward(self, pixel_values: Any, labels: Any = None, **its: Any) -> Any:
            pixel_values = torch.einsum("oc,bchw->bohw", self.colour, pixel_values)
            weights = torch.arange(96.0).view(1, 4, 24) / 96
            extra = (self.prompt * weights).mean() * self.layers_scale[
                0
            ].sum() + self.plain @ self.my_gamma
            extra = extra + self.mixing(torch.ones(4)).sum()
            return super().forward(pixel_values + 0.1 * extra, labels=labels, **its)

    return NetForImageClassification


@pytest.fixture
def base(tmp_path: Path) -> Path:
    from transformers import ViTForImageClassification

    torch.manual_seed(0)
    ViTForImageClassification(config()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def data() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 3} for i in range(48)]


def arguments(folder: Path, **options: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="no",
        report_to="none",
        logging_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )


OURS = {"prompt", "plain", "colour", "my_gamma", "layers_scale.0"}
UNDECAYED = ("prompt", "colour", "my_gamma", "vit.embeddings.cls_token")


@pytest.mark.parametrize("way", ["optimizer_cls_and_kwargs", "mix-in"])
def test_a_trainer_with_our_callback_and_groups(way: str, base: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    from learnables.integrations import transformers as ours

    model = kind().from_pretrained(base)
    args = arguments(tmp_path / "out", gradient_accumulation_steps=2, max_grad_norm=0.5)
    callback = ours.LearnablesCallback(watch=2, to=tmp_path / "run", budget=None)
    options: dict[str, Any] = {"train_dataset": data(), "callbacks": [callback]}
    if way == "mix-in":
        trainer = type("Mine", (ours.Groups, Trainer), {"layer_decay": 0.5})(model, args, **options)
    else:
        bridge = ours.optimizer_cls_and_kwargs(model, args, layer_decay=0.5)
        trainer = Trainer(model, args, optimizer_cls_and_kwargs=bridge, **options)
    trainer.train()
    groups = trainer.optimizer.param_groups
    decay = {name: g["weight_decay"] for g in groups for name in g["param_names"]}
    assert [decay[name] for name in UNDECAYED] == [0.0] * len(UNDECAYED)
    assert decay["vit.layers.0.mlp.fc1.weight"] == 0.1
    first = {name: g["initial_lr"] for g in groups for name in g["param_names"]}
    assert first["classifier.weight"] == 1e-2
    assert first["vit.layers.0.mlp.fc1.weight"] == 0.25e-2
    assert callback.report is not None
    assert callback.report.ok, str(callback.report)
    run = Run(callback.watcher.path)
    assert [o.step for o in run.observations] == [1, 2, 4, 6]
    assert "loss" in run.scalars


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd", "adafactor", "rmsprop"])
def test_the_mix_in_keeps_the_optimizer_that_was_asked_for(
    optim: str, base: Path, tmp_path: Path
) -> None:
    from transformers import Trainer

    from learnables.integrations.transformers import Groups

    args = arguments(tmp_path / "out", optim=optim, max_steps=2)
    mine = type("Mine", (Groups, Trainer), {})(kind().from_pretrained(base), args)
    plain = Trainer(kind().from_pretrained(base), args)
    ours, theirs = mine.create_optimizer(), plain.create_optimizer()
    assert type(ours) is type(theirs)
    assert ours.defaults.keys() == theirs.defaults.keys()
    held = [p for group in ours.param_groups for p in group["params"]]
    assert len(held) == len(list(mine.model.parameters()))
    assert {group["lr"] for group in ours.param_groups} == {args.learning_rate}


def test_the_mix_in_leaves_groups_of_a_special_kind(tmp_path: Path) -> None:
    from transformers import Trainer, ViTForImageClassification

    from learnables.integrations.transformers import Groups

    model = ViTForImageClassification(config())
    own = [{"params": [model.classifier.weight]}]
    trainer = type("Mine", (Groups, Trainer), {})(
        model,
        arguments(tmp_path / "out"),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"params": own, "lr": 0.5}),
    )
    (group,) = trainer.create_optimizer().param_groups
    assert group["params"] == [model.classifier.weight]
    assert group["lr"] == 0.5


def test_without_the_mix_in_a_new_parameter_is_memory_and_its_name_is_lost(base: Path) -> None:
    """The two upstream traps, so that we hear when they are mended there."""
    from learnables.integrations.transformers import names_lost_by_saving

    _, info = kind(safe=False).from_pretrained(base, output_loading_info=True)
    assert {"prompt", "colour", "plain"} <= set(info["missing_keys"])
    assert names_lost_by_saving(kind(safe=False)(config())) == {
        "layers_scale.0": "encoder.layer.scale.0"
    }


def test_a_new_parameter_keeps_its_declared_value_and_its_name(base: Path, tmp_path: Path) -> None:
    Net = kind()
    dirt = torch.empty(1 << 18).uniform_(3, 4)
    del dirt
    model, info = Net.from_pretrained(base, output_loading_info=True)
    assert "prompt" in info["missing_keys"]
    assert model.prompt.detach().eq(0.5).all()
    assert torch.equal(model.colour.detach(), torch.eye(3))
    assert model.plain.detach().eq(1e-4).all()
    assert model.my_gamma.detach().eq(2).all()
    assert model.layers_scale[0].detach().eq(3).all()
    assert model.mixing.weight.detach().std() < 0.1, "drawn by transformers, as it should be"
    assert not model.mixing.bias.detach().any()

    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    model.save_pretrained(tmp_path / "mine")
    again, info = Net.from_pretrained(tmp_path / "mine", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("start", [1.0, 3.0], ids=["filled", "loaded"])
def test_decay_goes_toward_what_training_starts_from(
    start: float, base: Path, tmp_path: Path
) -> None:
    model = kind().from_pretrained(base)
    if start != 1.0:
        model.colour.data.mul_(start)
        model.save_pretrained(tmp_path / "mine")
        model = kind().from_pretrained(tmp_path / "mine")
    groups = ln.param_groups(model, lr=0.1, weight_decay=0.5)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    ln.attach(model, optimizer)
    with torch.no_grad():
        model.colour.zero_()
    model.colour.grad = torch.zeros(3, 3)
    optimizer.step()
    torch.testing.assert_close(model.colour.detach(), 0.05 * start * torch.eye(3))


def test_a_name_that_is_rewritten_on_every_load_is_refused(tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    from learnables.integrations.transformers import Declared

    class Net(Declared, ViTForImageClassification):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.my_encoder = nn.Module()
            self.my_encoder.layer = nn.ParameterList([torch.ones(2)])  # read as my_layers.0
            self.post_init()

    with pytest.raises(CheckpointError, match="rewrites the name"):
        Net(config()).save_pretrained(tmp_path)


def test_the_audit_finds_both_traps_and_neither_with_the_mix_in(base: Path) -> None:
    model = kind(safe=False).from_pretrained(base)
    with torch.no_grad():  # what lies in memory differs from run to run
        model.prompt.fill_(7e22)
        model.plain.fill_(float("nan"))
    found = {(f.code, name) for f in ln.audit(model).findings for name in f.where}
    assert {("LRN805", "prompt"), ("LRN805", "plain"), ("LRN806", "layers_scale.0")} <= found
    named = {name for code, name in found if code in ("LRN805", "LRN806")}
    assert named <= OURS, "transformers' own parameters are fine"

    safe = kind().from_pretrained(base)
    assert "LRN805" not in ln.audit(safe).codes
    fresh = kind()(config())
    assert "LRN805" in ln.audit(fresh).skipped


def test_a_random_declared_initialiser_is_believed(base: Path) -> None:
    from transformers import ViTModel

    from learnables.integrations.transformers import Declared

    class Net(Declared, ViTModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.prompt = ln.parameter(1, 4, 24, init=ln.init.trunc_normal(0.02))
            self.post_init()

    model = Net.from_pretrained(base)
    assert 0.01 < model.prompt.detach().std() < 0.03
    assert ln.audit(model).ok


# --- layer-wise decay ----------------------------------------------------------------------------

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SEES = {**SIZES, "image_size": 16, "patch_size": 8}
READS = {**SIZES, "vocab_size": 30, "max_position_embeddings": 16, "pad_token_id": 0}
DISTIL = {"vocab_size": 30, "dim": 24, "n_layers": 3, "n_heads": 2, "hidden_dim": 48}
GPT2 = {"vocab_size": 30, "n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 16}
TIED = {"num_key_value_heads": 1, "tie_word_embeddings": True}
NETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertForSequenceClassification", "Bert", READS),
    "RoBERTa": ("RobertaForMaskedLM", "Roberta", READS),
    "DistilBERT": ("DistilBertForSequenceClassification", "DistilBert", DISTIL),
    "GPT-2": ("GPT2LMHeadModel", "GPT2", GPT2),
    "Llama": ("LlamaForCausalLM", "Llama", {**READS, "num_key_value_heads": 1}),
    "Llama, tied": ("LlamaForCausalLM", "Llama", {**READS, **TIED}),
    "ViT": ("ViTForImageClassification", "ViT", SEES),
    "DeiT": ("DeiTForImageClassification", "DeiT", SEES),
    "BEiT": ("BeitForImageClassification", "Beit", SEES),
    "DINOv2": ("Dinov2ForImageClassification", "Dinov2", SEES),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViT", SEES),
    "CLIP, vision": ("CLIPVisionModel", "CLIPVision", SEES),
    "SigLIP, vision": ("SiglipVisionModel", "SiglipVision", SEES),
}


def depth_by_hand(name: str) -> int:
    """Slow twin: 0 the embeddings, 1 … 3 the layers, 4 what comes behind, by the names in use."""
    layer = re.search(r"(?:^|\.)(?:layer|layers|h)\.(\d+)\.", name)
    if layer:
        return int(layer[1]) + 1
    entry = r"(^|\.)(embeddings|embed_tokens|wte|wpe|pre_layrnorm|patch_embedding)(\.|$)"
    return 0 if re.search(entry, name) else 4


@pytest.mark.parametrize("kind", NETS)
def test_rates_fall_from_layer_to_layer_in_any_family(kind: str) -> None:
    import transformers

    net, config, options = NETS[kind]
    model = getattr(transformers, net)(getattr(transformers, f"{config}Config")(**options))
    ln.graft(model, "prompts", ln.nn.Prompts(2, 24))  # new, and so at the full rate
    groups = ln.param_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert rates.keys() == {name for name, _ in model.named_parameters()}
    wanted = {name: 0.5 ** (4 - depth_by_hand(name)) for name in rates}
    assert rates == wanted
    assert set(rates.values()) == {0.0625, 0.125, 0.25, 0.5, 1.0}


def test_rates_fall_from_stage_to_stage_where_there_are_stages() -> None:
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    model = SwinForImageClassification(SwinConfig(image_size=56, window_size=7, **sizes))
    groups = ln.param_groups(model, lr=1.0, layer_decay=0.5)
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    fronts = [
        "swin.embeddings.",
        "swin.encoder.layers.0.blocks.0.",
        "swin.encoder.layers.0.blocks.1.",
        "swin.encoder.layers.0.downsample.",
        "swin.encoder.layers.1.blocks.0.",
        "swin.encoder.layers.1.blocks.1.",
        "swin.layernorm.",
        "classifier.",
    ]
    found = [{rate for name, rate in rates.items() if name.startswith(front)} for front in fronts]
    assert found == [{0.5**depth} for depth in (6, 5, 4, 3, 2, 1, 0, 0)]


# --- freezing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stays", ["statistics", "eval"])
def test_dropout_of_a_frozen_encoder_is_on_or_off_as_it_is_asked(stays: str) -> None:
    from transformers import ViTForImageClassification

    torch.manual_seed(0)
    options = config()
    options.hidden_dropout_prob = options.attention_probs_dropout_prob = 0.5
    model = ViTForImageClassification(options)
    ln.graft(model, "prompts", ln.nn.Prompts(2, 24, prefix=1))
    ln.train_only(model, ["prompts.*", "classifier.*"], stays=stays)
    x = torch.randn(2, 3, 16, 16)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        one.train()
        assert one.prompts.training
        assert one.classifier.training
        same = torch.equal(one(x).logits, one(x).logits)
        assert same == (stays == "eval")
