"""Real architectures with a real training step: the audit is quiet, or right."""

from typing import Any

import pytest
import torch
from torch import nn

import learnables as ln

TIMM = {
    "resnet18": {"size": 32},
    "convnext_atto": {"size": 64},
    "efficientnet_b0": {"size": 64},
    "levit_128s": {"size": 224},
    "regnety_002": {"size": 64},
    "mobilevit_xxs": {"size": 64},
    "eva02_tiny_patch14_224": {"size": 56, "img_size": 56, "depth": 2},
    "vit_tiny_patch16_224": {"size": 32, "img_size": 32, "patch_size": 8, "depth": 4},
    "vit_small_patch14_reg4_dinov2": {"size": 56, "img_size": 56, "depth": 2},
    "beit_base_patch16_224": {"size": 32, "img_size": 32, "depth": 2, "embed_dim": 96},
    "cait_xxs24_224": {"size": 64, "img_size": 64},
}


def audited(model: nn.Module, loss_of: Any) -> Any:
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3, weight_decay=0.05))

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return ln.audit(model, optimizer, step, steps=3)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    import timm

    torch.manual_seed(0)
    options = dict(TIMM[name])
    size = options.pop("size")
    model = timm.create_model(name, num_classes=10, **options).train()

    def loss() -> torch.Tensor:
        logits = model(torch.randn(4, 3, size, size))
        return nn.functional.cross_entropy(logits, torch.arange(4))

    report = audited(model, loss)
    assert report.ok, str(report)


RIGHTLY_NAMED = {
    # Trains only where images are masked, which classification never does; DDP raises for it.
    "Dinov2ForImageClassification": {"dinov2.embeddings.mask_token"},
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 60, "intermediate_size": 64, "max_position_embeddings": 32}
VISION = {**SMALL, "intermediate_size": 64, "image_size": 16, "patch_size": 4}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForMaskedLM": ("BertConfig", TEXT),
    "DistilBertForMaskedLM": (
        "DistilBertConfig",
        {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    ),
    "RobertaForMaskedLM": ("RobertaConfig", {**TEXT, "max_position_embeddings": 40}),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32},
    ),
    "LlamaForCausalLM": ("LlamaConfig", {**TEXT, "num_key_value_heads": 1}),
    "Qwen3ForCausalLM": ("Qwen3Config", {**TEXT, "num_key_value_heads": 1, "head_dim": 16}),
    "MambaForCausalLM": (
        "MambaConfig",
        {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2},
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    ),
    "ViTForImageClassification": ("ViTConfig", VISION),
    "DeiTForImageClassification": ("DeiTConfig", VISION),
    "Dinov2ForImageClassification": ("Dinov2Config", VISION),
    "BeitForImageClassification": ("BeitConfig", {**VISION, "use_relative_position_bias": True}),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    import transformers

    torch.manual_seed(0)
    config, options = TRANSFORMERS[name]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if "Image" in name:
        special = {"num_labels": 4}
    model = getattr(transformers, name)(getattr(transformers, config)(**options, **special)).train()

    def loss() -> torch.Tensor:
        if "Image" in name:
            return model(pixel_values=torch.randn(4, 3, 16, 16), labels=torch.arange(4)).loss
        ids = torch.randint(3, 60, (4, 12))
        if "T5" in name:
            return model(input_ids=ids, labels=ids, decoder_input_ids=ids).loss
        return model(input_ids=ids, labels=ids).loss

    report = audited(model, loss)
    wrong = {name for f in report.findings if f.severity != "note" for name in f.where}
    assert wrong == RIGHTLY_NAMED.get(name, set()), str(report)
