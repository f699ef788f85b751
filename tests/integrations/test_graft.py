"""Grafts in real architectures: put in, trained, audited, saved, loaded into a fresh model."""

import copy

import pytest
import torch
from torch import nn

import learnables as ln
from learnables.grafting.family import anatomy_of

TIMM = {
    "vit_tiny_patch16_224": 32,
    "deit_tiny_patch16_224": 32,
    "vit_small_patch14_dinov2": 56,
    "vit_small_patch16_dinov3": 64,
    "eva02_tiny_patch14_224": 56,
    "vit_base_patch16_siglip_224": 32,
}
TRANSFORMERS = ("ViT", "DeiT", "Beit", "Dinov2", "DINOv3ViT", "CLIPVision", "SiglipVision")
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
COMPONENTS = {
    "Prompts": lambda d: ln.nn.Prompts(4, d, prefix=1),
    "DeepPrompts": lambda d: ln.nn.DeepPrompts(2, 4, d, prefix=1),
    "RegisterTokens": lambda d: ln.nn.RegisterTokens(2, d),
    "MemoryTokens": lambda d: ln.nn.MemoryTokens(3, d),
    "ColorMatrix": lambda d: ln.nn.ColorMatrix(),
}


class Classifier(nn.Module):
    """A model of transformers behind a head, so that all answer with one tensor."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body, self.head = body, nn.Linear(48, 10)

    def forward(self, x):
        return self.head(self.body(x).last_hidden_state.mean(1))


def build(family: str) -> tuple[nn.Module, nn.Module, int]:
    """The model, that part of it that a family knows, and the size of its images."""
    if family in TIMM:
        import timm

        size = TIMM[family]
        model = timm.create_model(family, img_size=size, depth=2, num_classes=10)
        return model, model, size
    import transformers

    config = getattr(transformers, f"{family}Config")(**SMALL)
    body = getattr(transformers, f"{family}Model")(config)
    return Classifier(body), body, 32


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("family", [*TIMM, *TRANSFORMERS])
def test_trained_audited_saved_and_loaded_bit_equal(family, component, tmp_path):
    torch.manual_seed(0)
    model, known, size = build(family)
    base = copy.deepcopy(model).eval()
    x, y = torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 3])
    kept = list(model.state_dict())
    with torch.no_grad():
        before = model.eval()(x)
    prefix = "" if known is model else "body."
    anatomy = anatomy_of(known)
    at, where = f"{prefix}{anatomy.blocks}.*", None
    if component == "ColorMatrix":
        at, where = "", "input"
    handle = ln.graft(model, "extra", COMPONENTS[component](anatomy.width), at, where=where)
    ln.train_only(model, ["extra.*", "head.*"])
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-2, weight_decay=0.05))
    ln.attach(model, optimizer)

    def step():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(3):
        step()
    report = ln.audit(model, optimizer, step)
    assert report.ok, report
    ln.save_delta(model, tmp_path / "delta")
    ln.load_delta(base, tmp_path / "delta")
    ln.train_only(base, ["extra.*", "head.*"])
    with torch.no_grad():
        assert torch.equal(base(x), model(x))
    handle.remove()
    assert list(model.state_dict()) == kept
    assert before.shape == model(x).shape
