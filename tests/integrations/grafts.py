"""Families of real architectures × components, and what each combination has to do.

`tests/integrations/test_graft.py` holds every combination to it;

    .venv-integrations/bin/python -m tests.integrations.grafts

does the same, counts graph breaks, and writes the table of docs/*/grafting.md.
"""

import copy
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import learnables as ln
from learnables.errors import LearnablesError
from learnables.grafting.anatomy import Anatomy
from learnables.grafting.family import known_in

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "graft_combinations.json"
BEGIN, END = "<!-- combinations: begin -->", "<!-- combinations: end -->"


@dataclass(frozen=True)
class Family:
    """Of one library: how a small model of it with random weights is built, and what it reads."""

    library: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]

    @property
    def sees(self) -> bool:
        return self.inputs().is_floating_point()


# --- models: each answers a batch of 4 with (4, 10) ----------------------------------------------


def of_timm(name: str, size: int, **more: Any) -> Family:
    def build() -> nn.Module:
        import timm

        sizes = {} if "resnet" in name or "convnext" in name else {"img_size": size}
        return timm.create_model(name, num_classes=10, **sizes, **more)

    return Family("timm", build, lambda: torch.randn(4, 3, size, size))


class Pooled(nn.Module):
    """A model of transformers behind a head."""

    def __init__(self, body: nn.Module, width: int):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return self.head(self.body(x).last_hidden_state.mean(1))
        mask = (x != 0).long()
        states = self.body(x, attention_mask=mask).last_hidden_state
        return self.head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


SEES = {"image_size": 32, "patch_size": 8}
READS = {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
NONE = {"bos_token_id": None, "eos_token_id": None}
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}


def of_transformers(name: str, inputs: Callable[[], Tensor], **config: Any) -> Family:
    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, f"{name}Config")(**config)
        body = getattr(transformers, f"{name}Model")(made)
        return Pooled(body, int(made.hidden_size))

    return Family("transformers", build, inputs)


def image() -> Tensor:
    return torch.randn(4, 3, 32, 32)


def text() -> Tensor:
    ids = torch.randint(1, 64, (4, 9))
    ids[1, 5:] = 0  # padding on the right
    return ids


def prompt() -> Tensor:
    return text().flip(1)  # on the left, as decoders want it


def seeing(name: str, **more: Any) -> Family:
    return of_transformers(name, image, **SMALL, **SEES, **more)


def reading(name: str, inputs: Callable[[], Tensor] = text, **more: Any) -> Family:
    return of_transformers(name, inputs, **SMALL, **READS, **more)


DISTIL = {"dim": 48, "n_layers": 2, "n_heads": 3, "hidden_dim": 96}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64, "vocab_size": 64}
NARROW = {"depth": 2, "embed_dim": 96, "num_heads": 3}
STAGES = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4)}

FAMILIES = {
    "ViT": of_timm("vit_tiny_patch16_224", 32, depth=2),
    "DeiT": of_timm("deit_tiny_patch16_224", 32, depth=2),
    "DeiT, two class tokens": of_timm("deit_tiny_distilled_patch16_224", 32, depth=2),
    "DINOv2": of_timm("vit_small_patch14_dinov2", 56, **NARROW),
    "DINOv2, registers": of_timm("vit_small_patch14_reg4_dinov2", 56, **NARROW),
    "DINOv3": of_timm("vit_small_patch16_dinov3", 64, **NARROW),
    "EVA-02": of_timm("eva02_tiny_patch14_224", 56, depth=2),
    "SigLIP": of_timm("vit_base_patch16_siglip_224", 32, **NARROW),
    "BEiT": of_timm("beit_base_patch16_224", 32, **NARROW),
    "Swin": of_timm("swin_tiny_patch4_window7_224", 56, **STAGES),
    "ResNet": of_timm("resnet18", 64, zero_init_last=False),
    "ConvNeXt": of_timm("convnext_atto", 64),
    "ViT ": seeing("ViT"),
    "DeiT, two class tokens ": seeing("DeiT"),
    "BEiT ": seeing("Beit"),
    "DINOv2 ": seeing("Dinov2"),
    "DINOv3 ": seeing("DINOv3ViT"),
    "CLIP, vision": seeing("CLIPVision"),
    "SigLIP, vision": seeing("SiglipVision"),
    "Swin ": of_transformers(
        "Swin", lambda: torch.randn(4, 3, 56, 56), image_size=56, window_size=7, **STAGES
    ),
    "BERT": reading("Bert"),
    "RoBERTa": reading("Roberta"),
    "DistilBERT": of_transformers("DistilBert", text, **DISTIL, **READS),
    "GPT-2": of_transformers("GPT2", prompt, **GPT2, **NONE),
    "Llama": reading("Llama", prompt, **NONE),
    "Qwen3": reading("Qwen3", prompt, head_dim=16, num_key_value_heads=3),
}


# --- components: what is put where ---------------------------------------------------------------


def _first_block(model: nn.Module, anatomy: Anatomy | None) -> str:
    """Path of the first block; of the first stage of a convolutional network."""
    if anatomy is None:
        return "layer1" if hasattr(model, "layer1") else "stages.0"
    pattern = f"{anatomy.blocks}.*"
    names = [name for name, _ in model.named_modules() if fnmatchcase(name, pattern)]
    return next(n for n in names if n.count(".") == pattern.count("."))


def _parameter(model: nn.Module, block: str, pattern: str) -> str:
    names = [n for n, p in model.named_parameters() if n.startswith(block) and p.ndim >= 2]
    return next(n for n in names if re.search(pattern, n))


def _tokens(component: Callable[[int], nn.Module]) -> Callable[..., Any]:
    def put(model: nn.Module, anatomy: Anatomy | None, family: Family) -> Any:
        return component(anatomy.width if anatomy else 48), None

    return put


def _low_rank(model: nn.Module, anatomy: Anatomy | None, family: Family) -> Any:
    block = _first_block(model, anatomy)
    wanted = r"qkv\.weight|c_attn\.weight|(q_proj|query|q_lin|q|conv1|conv_dw)\.weight"
    name = _parameter(model, block, wanted)
    param, cut = model.get_parameter(name), {}
    if "qkv" in name or "c_attn" in name:
        cut = {"sections": 3, "chosen": (0, 2), "dim": -1 if "c_attn" in name else -2}
    return ln.nn.LowRankDelta(*param.shape, rank=2, **cut), name


def _blocks(model: nn.Module, anatomy: Anatomy | None, family: Family) -> Any:
    wanted = r"(fc1|fc1_g|up_proj|lin1|c_fc)\.weight|intermediate.*weight|mlp.*w"
    name = _parameter(model, _first_block(model, anatomy), wanted)
    out, into = model.get_parameter(name).shape
    return ln.nn.BlockSparseDelta(out, into, block=8, density=0.2), name


def _scale(model: nn.Module, anatomy: Anatomy | None, family: Family) -> Any:
    block = _first_block(model, anatomy)
    shape = _sees(model, block, family, output=True)
    if anatomy is None:
        return ln.nn.LayerScale2d(shape[1], 0.5), block
    return ln.nn.LayerScale(shape[-1], 0.5), block


def _sees(model: nn.Module, path: str, family: Family, *, output: bool) -> tuple[int, ...]:
    """Shape of the first input, or output, of a module."""
    seen: list[tuple[int, ...]] = []

    def look(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()))
        last = out[0] if isinstance(out, tuple) else out
        seen.append(tuple((last if output else first).shape))

    handle = model.get_submodule(path).register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(family.inputs())
    handle.remove()
    return seen[0]


def _bias(model: nn.Module, anatomy: Anatomy | None, family: Family) -> Any:
    if not anatomy or not anatomy.attention:
        return ln.nn.RelativeBias(2, 3), None
    heads = next(
        int(h)
        for m in model.modules()
        if (h := getattr(m, "num_heads", None) or getattr(m, "num_attention_heads", None))
    )
    tokens = _sees(model, _first_block(model, anatomy), family, output=False)[1]
    side = round((tokens - anatomy.prefix) ** 0.5)
    return ln.nn.RelativeBias(side, heads, prefix=anatomy.prefix), None


COMPONENTS: dict[str, Callable[..., Any]] = {
    "Prompts": _tokens(lambda d: ln.nn.Prompts(4, d, prefix=0)),
    "DeepPrompts": _tokens(lambda d: ln.nn.DeepPrompts(2, 4, d)),
    "RegisterTokens": _tokens(lambda d: ln.nn.RegisterTokens(2, d)),
    "MemoryTokens": _tokens(lambda d: ln.nn.MemoryTokens(3, d)),
    "ColorMatrix": lambda model, anatomy, family: (ln.nn.ColorMatrix(), ""),
    "LayerScale": _scale,
    "RelativeBias": _bias,
    "LowRankDelta": _low_rank,
    "BlockSparseDelta": _blocks,
}
TOKENS = ("Prompts", "DeepPrompts", "RegisterTokens", "MemoryTokens")


def _gate(model: nn.Module, anatomy: Anatomy | None, family: Family) -> Any:
    scale, block = _scale(model, anatomy, family)
    return ln.nn.Gate(scale.gamma.shape[0], value=0.5), block


def _vector(model: nn.Module, anatomy: Anatomy | None, family: Family) -> Any:
    block = _first_block(model, anatomy)
    names = [n for n, p in model.named_parameters() if n.startswith(block) and p.ndim == 1]
    return ln.nn.LowRankDelta(*model.get_parameter(names[0]).shape), names[0]


# Not in the table: in some families only.
MORE: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "ClassToken": (_tokens(ln.nn.ClassToken), ("ViT", "DINOv3", "DINOv2 ", "BERT", "Llama")),
    "Gate": (_gate, ("ViT", "Swin", "ViT ", "Swin ", "BERT", "GPT-2", "Llama")),
    "ColorLUT": (
        lambda model, anatomy, family: (ln.nn.ColorLUT(5), ""),
        ("ViT", "ResNet", "SigLIP, vision"),
    ),
    "LowRankDelta of a vector": (_vector, ("ViT", "ResNet", "ConvNeXt", "BEiT ", "BERT", "Llama")),
}


def expected(family: str, component: str) -> str:
    """``"works"``, ``"refused"``, or ``"none"`` where the combination has no meaning."""
    model = FAMILIES[family]
    if component == "ColorMatrix" and not model.sees:
        return "none"
    if component in TOKENS:
        return "refused" if family.strip() in REFUSE_TOKENS[model.library] else "works"
    if component == "RelativeBias":
        windows = family.strip() in (*REFUSE_TOKENS[model.library], "ResNet", "ConvNeXt")
        return "none" if not model.sees else "refused" if windows else "works"
    if component == "BlockSparseDelta" and family in ("ResNet", "ConvNeXt"):
        return "none"
    return "works"


REFUSE_TOKENS = {"timm": ("BEiT", "Swin", "ResNet", "ConvNeXt"), "transformers": ("Swin",)}


# --- one combination -----------------------------------------------------------------------------


def grafted(family: str, component: str) -> tuple[nn.Module, Any, Tensor]:
    """A fresh model with the graft, its handle, and a batch."""
    torch.manual_seed(0)
    kind = FAMILIES[family]
    model, x = kind.build(), kind.inputs()
    anatomy = next(known_in(model), None)
    build = COMPONENTS[component] if component in COMPONENTS else MORE[component][0]
    made, at = build(model, anatomy, kind)
    where = "input" if component.startswith("Color") else None
    return model, ln.graft(model, "extra", made, at, where=where), x


def trained_saved_and_loaded(family: str, component: str, folder: Path) -> None:
    """Graft, train, audit, save, load into a fresh model, compare, remove.

    Raises:
        AssertionError: A step did not do what it has to.
    """
    model, handle, x = grafted(family, component)
    torch.manual_seed(0)
    base = FAMILIES[family].build()
    same = {n: v for n, v in model.state_dict().items() if not n.startswith("extra.")}
    base.load_state_dict(same)
    plain = copy.deepcopy(base).eval()
    trainable = ["extra.*", *(n for n, _ in model.named_parameters() if _is_head(n))]
    ln.train_only(model, trainable, stays="eval")
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-2, weight_decay=0.05))
    ln.attach(model, optimizer)
    y = torch.tensor([0, 1, 2, 3])

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    model.train()
    for _ in range(3):
        step()
    report = ln.audit(model, optimizer, step)
    assert report.ok, report
    for name, param in handle.component.named_parameters():
        assert param.grad is not None, name
        assert param.grad.any(), name
    ln.save_delta(model, folder / "delta")
    ln.load_delta(base, folder / "delta")
    ln.train_only(base, trainable, stays="eval")
    model.eval(), base.eval()
    with torch.no_grad():
        assert torch.equal(base(x), model(x))
        handle.remove()
        left = model.state_dict()
        assert list(left) == list(plain.state_dict())
        for name, value in plain.state_dict().items():  # statistics of BatchNorm, too
            if not _is_head(name):
                assert torch.equal(value, left[name]), name
        for ours, theirs in zip(plain.modules(), model.modules(), strict=True):
            assert type(ours) is type(theirs)
            assert len(ours._forward_hooks) == len(theirs._forward_hooks)
            assert len(ours._forward_pre_hooks) == len(theirs._forward_pre_hooks)
        plain.load_state_dict(model.state_dict())
        for ours, theirs in zip(plain.parameters(), model.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)  # torch multiplies another way otherwise
        assert torch.equal(plain(x), model(x))


def _is_head(name: str) -> bool:
    return bool(re.match(r"(head|head_dist|fc)(\.|$)", name))


def graph_breaks(family: str, component: str | None) -> int:
    """How many ``torch._dynamo.explain`` counts in one forward."""
    torch._dynamo.reset()
    if component is None:
        torch.manual_seed(0)
        model, x = FAMILIES[family].build(), FAMILIES[family].inputs()
    else:
        model, _, x = grafted(family, component)
    model.eval()

    def call(x: Tensor) -> Tensor:
        return model(x)

    with torch.no_grad():
        return int(torch._dynamo.explain(call)(x).graph_break_count)


# --- the same with PEFT, where it has something of the kind --------------------------------------


def by_peft(family: str, component: str) -> str:
    """``""`` where PEFT's counterpart trains in this family, else what it said.

    Prompt tuning and prefix tuning for shallow and deep prompts, LoRA on the same module for the
    delta of low rank. It trains where one backward leaves a gradient in what PEFT added.
    """
    import peft

    torch.manual_seed(0)
    kind = FAMILIES[family]
    model, x = kind.build(), kind.inputs()
    body = model.body if isinstance(model, Pooled) else model
    virtual: dict[str, Any] = {"task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": 4}
    if body is not model:  # told, since PEFT does not know every name in a configuration
        virtual |= {"token_dim": 48, "num_layers": 2, "num_attention_heads": 3}
    config: Any = {
        "Prompts": lambda: peft.PromptTuningConfig(**virtual),
        "DeepPrompts": lambda: peft.PrefixTuningConfig(**virtual),
        "LowRankDelta": lambda: peft.LoraConfig(
            r=2, target_modules=[_low_rank(body, next(known_in(body), None), kind)[1][:-7]]
        ),
    }[component]()
    try:
        wrapped = peft.get_peft_model(body, config)
        wrapped.train()
        told = {} if kind.sees else {"attention_mask": (x != 0).long()}
        out = wrapped(x, **told)
        states = out if isinstance(out, Tensor) else out.last_hidden_state
        states.square().mean().backward()
        grads = [p.grad for p in wrapped.parameters() if p.requires_grad]
        moved = any(grad is not None and grad.any() for grad in grads)
        return "" if moved else "no gradient arrives"
    except Exception as error:  # whatever a library of others says is what is counted here
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


PEFT_HAS = ("Prompts", "DeepPrompts", "LowRankDelta")

# --- the table -----------------------------------------------------------------------------------

WORDS = {
    "en": ("family", "refused", "graph breaks added", "works in"),
    "zh": ("家族", "拒绝", "新增图中断", "可用于"),
}


def measured() -> dict[str, Any]:
    """Every combination tried, with the graph breaks that it adds."""
    import peft
    import timm
    import transformers

    rows: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        plain = graph_breaks(family, None)
        rows[family] = {}
        for component in COMPONENTS:
            rows[family][component] = cell = _measure(family, component, plain)
            if component in PEFT_HAS:
                cell["peft"] = by_peft(family, component)
            print(family.strip(), component, cell, flush=True)
    versions = {lib.__name__: lib.__version__ for lib in (timm, transformers, peft)}
    return {"versions": versions, "torch": torch.__version__, "combinations": rows}


def _measure(family: str, component: str, plain: int) -> dict[str, Any]:
    wanted = expected(family, component)
    if wanted == "none":
        return {"outcome": "none"}
    try:
        with tempfile.TemporaryDirectory() as folder:
            trained_saved_and_loaded(family, component, Path(folder))
    except LearnablesError as error:
        return {"outcome": "refused", "why": error.what}
    return {"outcome": "works", "breaks": graph_breaks(family, component) - plain}


def table(results: dict[str, Any], language: str) -> str:
    """The table of the page, from what was measured."""
    family_, refused, breaks_, works_in = WORDS[language]
    lines = [f"| {family_} | {' | '.join(f'`{c}`' for c in COMPONENTS)} | {breaks_} |"]
    lines.append("|---" * (len(COMPONENTS) + 2) + "|")
    signs = {"works": "✓", "refused": refused, "none": "—"}
    rows = results["combinations"]
    for family, cells in rows.items():
        added = sum(cell.get("breaks", 0) for cell in cells.values())
        marks = " | ".join(signs[cells[c]["outcome"]] for c in COMPONENTS)
        library = FAMILIES[family].library
        lines.append(f"| {library} {family.strip()} | {marks} | {added} |")
    counts, peft = [], []
    for component in COMPONENTS:
        ours = [f for f, cells in rows.items() if cells[component]["outcome"] == "works"]
        theirs = [f for f in ours if rows[f][component].get("peft", None) == ""]
        counts.append(f"{len(ours)}")
        peft.append(f"{len(theirs)}" if component in PEFT_HAS else "—")
    lines.append(f"| **{works_in}** | {' | '.join(counts)} | |")
    lines.append(f"| PEFT {results['versions']['peft']}, {works_in} | {' | '.join(peft)} | |")
    return "\n".join(lines)


def write(results: dict[str, Any]) -> None:
    """Put the table into both pages."""
    for language in WORDS:
        page = ROOT / "docs" / language / "grafting.md"
        front, rest = page.read_text(encoding="utf-8").split(BEGIN)
        _, back = rest.split(END)
        text = f"{front}{BEGIN}\n{table(results, language)}\n{END}{back}"
        page.write_text(text, encoding="utf-8")


def main() -> None:
    """Measure, save, write."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from tests.integrations.shim import ensure_torchvision

    warnings.simplefilter("ignore")
    ensure_torchvision()
    torch.set_num_threads(1)
    results = measured()
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write(results)


if __name__ == "__main__":
    main()
