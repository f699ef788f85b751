"""`learnables run` on scripts as the documentation of other people's libraries writes them.

Each is run as it is, where no finding may be more than a note, and with one bug planted, which has
to be named, at its line where a line is to blame.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.scripts.planting import (
    OPTIONS,
    ROOT,
    Bug,
    Run,
    check_good_and_bad,
    findings_in,
    plant,
    zygote,
)

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"
PACKAGES = ("timm", "transformers", "peft", "accelerate", "lightning", "torchvision")

BUGS = [
    Bug(
        "lightning_classifier.py",
        "x + self.pos_embed",
        "x + self.pos_embed.detach()",
        "LRN301",
        ("pos_embed",),
        "x = self.encoder(x + self.pos_embed.detach())",
    ),
    Bug(
        "lightning_accumulate.py",
        "self.encoder(x) * self.scale",
        "self.encoder(x) * self.scale.data",
        "LRN301",
        ("scale",),
        "z = self.encoder(x) * self.scale.data",
    ),
    Bug(
        "lightning_gan.py",
        "Adam(self.discriminator.parameters()",
        "Adam(self.generator.parameters()",
        "LRN202",
        ("generator.model.0.weight",),
    ),
    Bug(
        "fabric_loop.py",
        "Adadelta(model.parameters(), lr",
        "Adadelta([*model.conv1.parameters(), *model.fc.parameters()], lr",
        "LRN201",
        ("_forward_module.gain", "_forward_module.conv2.weight"),
    ),
    Bug(
        "trainer_vit.py",
        "model = ViTForImageClassification(config)\n",
        "model = ViTForImageClassification(config)\n"
        "model.vit.layernorm.register_forward_hook(lambda module, args, out: out.detach())\n",
        "LRN301",
        ("vit.embeddings.cls_token", "vit.layernorm.weight"),
        "model.vit.layernorm.register_forward_hook(lambda module, args, out: out.detach())",
    ),
    Bug(
        "trainer_text.py",
        "    processing_class=tokenizer,\n",
        "    processing_class=tokenizer,\n"
        "    optimizers=(torch.optim.AdamW(model.classifier.parameters(), lr=1e-3), None),\n",
        "LRN201",
        ("bert.embeddings.word_embeddings.weight", "bert.pooler.dense.bias"),
    ),
    Bug(
        "trainer_gpt2.py",
        'outputs.get("logits")',
        'outputs.get("logits").detach().requires_grad_()',
        "LRN301",
        ("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias"),
        'logits = outputs.get("logits").detach().requires_grad_()',
    ),
    Bug(
        "trainer_subclass.py",
        "pooled = self.gamma *",
        "pooled = self.gamma.item() *",
        "LRN301",
        ("gamma",),
        'pooled = self.gamma.item() * torch.einsum("l,lbtd->bd", mix, states) / states.shape[2]',
    ),
    Bug(
        "accelerate_plain.py",
        "            optimizer.zero_grad()\n",
        "",
        "LRN404",
        ("classifier.weight", "bert.pooler.dense.weight"),
    ),
    Bug(
        "accelerate_accumulate.py",
        "[self.prompts.expand",
        "[self.prompts.data.expand",
        "LRN301",
        ("prompts",),
        "x = torch.cat([self.prompts.data.expand(len(ids), -1, -1), self.embed(ids)], dim=1)",
    ),
    Bug(
        "timm_train.py",
        "model_ema = ",
        "model.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 48))\nmodel_ema = ",
        "LRN201",
        ("cls_token",),
    ),
    Bug(
        "timm_finetune.py",
        "scheduler = CosineLRScheduler",
        "model.reset_classifier(num_classes=5)\nscheduler = CosineLRScheduler",
        "LRN201",
        ("head.weight", "head.bias"),
    ),
    Bug(
        "timm_probe.py",
        "SGD(model.head.parameters()",
        "SGD(model.backbone.parameters()",
        "LRN201",
        ("head.weight", "head.bias"),
    ),
    Bug(
        "torchvision_classification.py",
        "            (norm_params if isinstance(module, norm_classes) else params).append(p)\n",
        "            if not isinstance(module, norm_classes):\n                params.append(p)\n",
        "LRN201",
        ("features.0.1.weight", "features.0.1.bias"),
    ),
    Bug(
        "torchvision_segmentation.py",
        '"lr": 0.1}',
        '"lr": 0.0}',
        "LRN402",
        ("classifier.cbr.0.weight", "classifier.high_classifier.bias"),
    ),
    Bug(
        "torchvision_transfer.py",
        "exp_lr_scheduler = ",
        "model_conv.fc = nn.Linear(num_ftrs, 2)\nexp_lr_scheduler = ",
        "LRN201",
        ("fc.weight", "fc.bias"),
    ),
    Bug(
        "peft_vision.py",
        "lora_model.print_trainable_parameters()\n",
        "lora_model.base_model.model.vit.layers[0].register_forward_hook(\n"
        "    lambda module, args, out: out.detach()\n)\n",
        "LRN301",
        ("base_model.model.vit.layers.0.attention.q_proj.lora_A.default.weight",),
        "lambda module, args, out: out.detach()",
    ),
    Bug(
        "peft_text.py",
        "AdamW(model.parameters(), lr=lr)",
        'AdamW([p for n, p in model.named_parameters() if "lora_A" in n], lr=lr)',
        "LRN201",
        ("base_model.model.transformer.h.0.attn.c_attn.lora_B.default.weight",),
    ),
    Bug(
        "compiled_timm.py",
        "self.colour, x",
        "self.colour.detach(), x",
        "LRN301",
        ("_orig_mod.colour",),
        'x = torch.einsum("oc,bchw->bohw", self.colour.detach(), x)',
    ),
    Bug(
        "clip_contrastive.py",
        'if p.ndim < 2 or "embed" in n]\n',
        'if "embed" in n]\n',
        "LRN201",
        ("logit_scale", "text_model.final_layer_norm.weight"),
    ),
    Bug(
        "optimizer_in_backward.py",
        "torch.nn.init.normal_",
        "model.encoder.register_forward_hook(lambda module, args, out: out.detach())\n"
        "torch.nn.init.normal_",
        "LRN301",
        ("class_token", "encoder.ln.weight"),
        "model.encoder.register_forward_hook(lambda module, args, out: out.detach())",
    ),
]
ALONE = ("timm_train", "trainer_gpt2", "peft_vision", "accelerate_plain", "lightning_gan")
"""Run in a fresh process too, where their libraries are imported after we are."""

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{HERE / 'site'}:{ROOT / 'src'}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture(scope="module")
def learnables() -> Iterator[Run]:
    """A function that runs a command line of `learnables` in a folder."""
    with zygote(ENVIRONMENT, *PACKAGES) as run:
        yield run


def test_every_program_has_its_bug() -> None:
    assert {bug.program for bug in BUGS} == {path.name for path in PROGRAMS.glob("*.py")}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.program.removesuffix(".py"))
def test_a_good_program_raises_no_alarm_and_a_planted_bug_is_named(
    bug: Bug, learnables: Run, tmp_path: Path
) -> None:
    check_good_and_bad(bug, PROGRAMS, learnables, tmp_path)


@pytest.mark.parametrize("name", ALONE)
def test_a_fresh_process_says_the_same(name: str, tmp_path: Path) -> None:
    words = [sys.executable, "-W", "ignore", "-m", "learnables", *OPTIONS, "--fail"]
    done = subprocess.run(
        [*words, str(PROGRAMS / f"{name}.py")],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert findings_in(tmp_path / "report.json") == []


def test_accelerate_launch_starts_a_module(tmp_path: Path) -> None:
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "learnables", *OPTIONS]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "--fail", str(PROGRAMS / "accelerate_plain.py")],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert findings_in(tmp_path / "report.json") == []


@pytest.mark.slow
@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("name", ["accelerate_plain.py", "trainer_vit.py"])
def test_two_ranks_under_torchrun_say_the_same(name: str, planted: bool, tmp_path: Path) -> None:
    bug = next(bug for bug in BUGS if bug.program == name)
    program = plant(bug, PROGRAMS, tmp_path) if planted else PROGRAMS / name
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, "-W", "ignore", *ranks, "-m", "learnables", *OPTIONS, "--fail"]
    done = subprocess.run(
        [*words, str(program)],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == int(planted), done.stderr
    found = findings_in(tmp_path / "report.json")
    if not planted:
        assert found == []
        return
    named = {n.removeprefix("module.") for f in found if f["code"] == bug.code for n in f["where"]}
    assert set(bug.where) <= named, found
