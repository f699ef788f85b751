"""What a graft costs: time beyond the arithmetic of the longer sequence, and graph breaks.

    .venv-integrations/bin/python benchmarks/graft.py             # both, three minutes on one core
    .venv-integrations/bin/python benchmarks/graft.py --overhead  # the time only
    .venv-integrations/bin/python benchmarks/graft.py --breaks    # the graph breaks only
    python benchmarks/graft.py --table                            # write it into the pages

Eight prompts in timm's ViT-S, by `ln.graft`, against a forward written by hand that concatenates
the same tokens before the same blocks and cuts them out after: whatever is over is the graft's.
PEFT puts no tokens into a vision model; beside it is its way to reach a raw parameter, LoRA by
``target_parameters``, and ours, both against the same sum W + BA written by hand.
Runs alternate, first one first and then the other, in CPU seconds of one thread; the interval is
the 95 % bootstrap interval of the median ratio.
"""

import argparse
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from environment import parts, save_part, where, write_tables
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.integrations.shim import ensure_torchvision

import learnables as ln
from learnables.nn.comparison import interval, paired

PROMPTS = 8
Call = Callable[[Tensor], Tensor]


# --- time ----------------------------------------------------------------------------------------


def vit(**options: Any) -> Any:
    import timm

    torch.manual_seed(0)
    options = {"num_classes": 10, **options}
    return timm.create_model("vit_small_patch16_224", **options).eval()


def by_graft(model: Any) -> Call:
    ln.graft(model, "prompts", prompts(model))
    return model


def prompts(model: Any) -> nn.Module:
    torch.manual_seed(1)
    return ln.nn.Prompts(PROMPTS, model.embed_dim, prefix=1)


def by_hand(model: Any) -> Call:
    """What one writes without a library: timm's own forward, with two concatenations."""
    tokens = prompts(model).tokens

    def forward(images: Tensor) -> Tensor:
        x = model.patch_embed(images)
        x = model._pos_embed(x)
        x = model.norm_pre(model.patch_drop(x))
        x = torch.cat([x[:, :1], tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        x = model.blocks(x)
        x = torch.cat([x[:, :1], x[:, 1 + PROMPTS :]], dim=1)
        return model.forward_head(model.norm(x))

    return forward


def by_peft(model: Any) -> Call:
    """LoRA of rank 8 on the fused qkv weights, named as raw parameters."""
    from peft import LoraConfig, get_peft_model

    targets = [f"blocks.{i}.attn.qkv.weight" for i in range(len(model.blocks))]
    config = LoraConfig(r=8, lora_alpha=8, target_modules=[], target_parameters=targets)
    return get_peft_model(model, config).eval()


def low_rank_by_graft(model: Any) -> Call:
    for i, block in enumerate(model.blocks):
        delta = ln.nn.LowRankDelta(*block.attn.qkv.weight.shape, rank=8)
        ln.graft(model, f"delta{i}", delta, f"blocks.{i}.attn.qkv.weight")
    return model


def low_rank_by_hand(model: Any) -> Call:
    """The same products as PEFT's: W + BA is made in each forward and used once."""
    factors = [
        (torch.randn(8, w.shape[1]), torch.zeros(w.shape[0], 8))
        for w in (block.attn.qkv.weight for block in model.blocks)
    ]
    for block, (a, b) in zip(model.blocks, factors, strict=True):
        qkv = block.attn.qkv

        def forward(x: Tensor, qkv: Any = qkv, a: Tensor = a, b: Tensor = b) -> Tensor:
            return nn.functional.linear(x, qkv.weight + b @ a, qkv.bias)

        qkv.forward = forward
    return model


PAIRS: dict[str, tuple[Callable[[Any], Call], Callable[[Any], Call]]] = {
    "8 prompts, ln.graft": (by_graft, by_hand),
    "12 low-rank deltas, ln.graft": (low_rank_by_graft, low_rank_by_hand),
    "12 low-rank deltas, PEFT's target_parameters": (by_peft, low_rank_by_hand),
    "nothing (the noise)": (lambda model: model, lambda model: model),
}


@torch.no_grad()
def overhead(seconds: float, size: int, batch: int) -> list[dict[str, Any]]:
    rows = []
    for name, (make, make_base) in PAIRS.items():
        x = torch.randn(batch, 3, size, size)
        ours, base = make(vit(img_size=size)), make_base(vit(img_size=size))
        equal = torch.equal(ours(x), base(x))
        calls = (partial(base, x), partial(ours, x))
        pairs = paired(*calls, torch.device("cpu"), seconds)
        ratios, median = [b / a for a, b in pairs], statistics.median(a for a, _ in pairs)
        low, high = interval(ratios, draws=2000)
        rows.append(
            {
                "what": name,
                "image": size,
                "batch": batch,
                "ms by hand": 1e3 * median,
                "ratio": statistics.median(ratios),
                "low 95 %": low,
                "high 95 %": high,
                "pairs": len(ratios),
                "bit-equal": equal,
            }
        )
        print(
            f"{name:44} {size} px, batch {batch}: × {rows[-1]['ratio']:.4f} of by hand "
            f"({1e3 * median:.1f} ms); 95 %: {low:.4f} to {high:.4f}, {len(ratios)} pairs; "
            f"{'bit-equal' if equal else 'not bit-equal'}",
            flush=True,
        )
    return rows


# --- graph breaks --------------------------------------------------------------------------------


def grafted() -> Iterator[tuple[str, Callable[[Any, int], object]]]:
    """Every kind of component, and how it is put into a model of that width with two blocks."""

    def tokens(make: Callable[[int], nn.Module]) -> Callable[[Any, int], object]:
        return lambda model, width: ln.graft(model, "extra", make(width))

    yield "Prompts", tokens(lambda d: ln.nn.Prompts(PROMPTS, d, prefix=1))
    yield "DeepPrompts", tokens(lambda d: ln.nn.DeepPrompts(2, PROMPTS, d, prefix=1))
    yield "RegisterTokens", tokens(lambda d: ln.nn.RegisterTokens(4, d))
    yield "MemoryTokens", tokens(lambda d: ln.nn.MemoryTokens(4, d))
    yield "ClassToken", tokens(ln.nn.ClassToken)
    for name, make in {
        "LayerScale": ln.nn.LayerScale,
        "Gate": lambda d: ln.nn.Gate(),
    }.items():
        yield (
            name,
            lambda model, width, make=make: ln.graft(
                model, "extra", make(width), at=f"{blocks_of(model)}.*"
            ),
        )
    for name, make in {
        "ColorMatrix": ln.nn.ColorMatrix,
        "ColorLUT": lambda: ln.nn.ColorLUT(9),
    }.items():
        yield (
            name,
            lambda model, width, make=make: ln.graft(model, "extra", make(), "", where="input"),
        )
    yield "a delta on a parameter", on_a_parameter


def blocks_of(model: Any) -> str:
    from learnables.grafting.family import anatomy_of

    return anatomy_of(model).blocks


def on_a_parameter(model: Any, width: int) -> object:
    name, param = next(
        (name, p) for name, p in model.named_parameters() if p.ndim == 2 and "fc1" in name
    )
    return ln.graft(model, "extra", ln.nn.LowRankDelta(*param.shape, rank=2), name)


def bodies() -> dict[str, Callable[[], tuple[Any, Tensor]]]:
    import transformers

    small = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96}
    small |= {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}

    def theirs(kind: str) -> tuple[Any, Tensor]:
        config = getattr(transformers, f"{kind}Config")(**small)
        return getattr(transformers, f"{kind}Model")(config).eval(), torch.randn(2, 3, 32, 32)

    def timms(name: str, size: int) -> tuple[Any, Tensor]:
        import timm

        model = timm.create_model(name, img_size=size, depth=2, num_classes=10).eval()
        return model, torch.randn(2, 3, size, size)

    return {
        "timm ViT": lambda: timms("vit_tiny_patch16_224", 32),
        "timm DINOv2": lambda: timms("vit_small_patch14_dinov2", 56),
        "transformers ViT": lambda: theirs("ViT"),
    }


def count(model: Any, x: Tensor) -> int:
    torch._dynamo.reset()

    def call(x: Tensor) -> object:  # with the hooks of the model itself, as torch.compile(model)
        return model(x)

    return int(torch._dynamo.explain(call)(x).graph_break_count)


def breaks() -> list[dict[str, Any]]:
    rows = []
    for body, make in bodies().items():
        bare = count(*make())
        for name, put in grafted():
            model, x = make()
            width = getattr(model, "embed_dim", None) or model.config.hidden_size
            put(model, width)
            rows.append(
                {"model": body, "what": name, "bare": bare, "added": count(model, x) - bare}
            )
        mine = [row["added"] for row in rows if row["model"] == body]
        print(f"{body:22} {sum(mine)} graph breaks added by {len(mine)} kinds of graft", flush=True)
    for depth in (2, 6):
        bare = count(vit(img_size=32, depth=depth), torch.randn(2, 3, 32, 32))
        what = f"PEFT target_parameters, {depth} layers"
        row: dict[str, Any] = {"model": "timm ViT", "what": what, "bare": bare}
        try:
            theirs = count(by_peft(vit(img_size=32, depth=depth)), torch.randn(2, 3, 32, 32))
            row["added"] = theirs - bare
            print(f"{what}: {row['added']} graph breaks added", flush=True)
        except torch._dynamo.exc.InternalTorchDynamoError as error:
            row |= {"added": None, "raised": str(error).split("\n")[0]}
            print(f"{what}: {row['raised']}", flush=True)
        rows.append(row)
    return rows


# --- pages ---------------------------------------------------------------------------------------

WORDS = {
    "en": (
        "| what | against | × by hand | 95 % | graph breaks added |\n|---|---|---|---|---|",
        {
            "8 prompts, ln.graft": ("8 prompts, `ln.graft`", "two concatenations by hand"),
            "12 low-rank deltas, ln.graft": ("12 low-rank deltas, `ln.graft`", "W + BA by hand"),
            "12 low-rank deltas, PEFT's target_parameters": (
                "12 low-rank deltas, PEFT's `target_parameters`",
                "W + BA by hand",
            ),
            "nothing (the noise)": ("nothing (the noise)", "itself"),
        },
        "{breaks} in {models} models and {kinds} kinds of graft",
        "{breaks} for 6 layers",
        "dynamo raises an internal error",
    ),
    "zh": (
        "| 什么 | 与谁比 | × 手写 | 95 % | 增加的图断点 |\n|---|---|---|---|---|",
        {
            "8 prompts, ln.graft": ("8 个提示，`ln.graft`", "手写的两次拼接"),
            "12 low-rank deltas, ln.graft": ("12 个低秩增量，`ln.graft`", "手写的 W + BA"),
            "12 low-rank deltas, PEFT's target_parameters": (
                "12 个低秩增量，PEFT 的 `target_parameters`",
                "手写的 W + BA",
            ),
            "nothing (the noise)": ("什么都不加（噪声）", "自己"),
        },
        "{models} 个模型、{kinds} 种嫁接共 {breaks} 个",
        "6 层共 {breaks} 个",
        "dynamo 抛出内部错误",
    ),
}


def table(language: str) -> str:
    found = parts("graft")
    head, names, ours_said, theirs_said, raised = WORDS[language]
    broken = found["breaks"]["rows"]
    ours = [row for row in broken if "PEFT" not in row["what"]]
    (theirs,) = (row["added"] for row in broken if "6 layers" in row["what"])
    all_ours = ours_said.format(
        breaks=sum(row["added"] for row in ours),
        models=len({row["model"] for row in ours}),
        kinds=len({row["what"] for row in ours}),
    )
    lines = [head]
    for row in found["overhead"]["rows"]:
        name, against = names[row["what"]]
        span = f"{row['low 95 %']:.3f} – {row['high 95 %']:.3f}"
        added = "–" if "noise" in row["what"] else all_ours
        if "PEFT" in row["what"]:
            added = raised if theirs is None else theirs_said.format(breaks=theirs)
        lines.append(f"| {name} | {against} | {row['ratio']:.3f} | {span} | {added} |")
    return "\n".join([*lines, "", where(found["overhead"]["environment"], language)])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--overhead", action="store_true", help="the time only")
    parser.add_argument("--breaks", action="store_true", help="the graph breaks only")
    parser.add_argument("--table", action="store_true", help="write the files into the pages")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each pair")
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--no-save", action="store_true")
    wanted = parser.parse_args()
    if wanted.table:
        write_tables("grafting", "graft", table)
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    ensure_torchvision()
    torch.set_num_threads(1)
    both = wanted.overhead == wanted.breaks
    if both or wanted.overhead:
        rows = overhead(wanted.seconds, wanted.size, wanted.batch)
        if not wanted.no_save:
            save_part("graft", "overhead", rows)
    failed = False
    if both or wanted.breaks:
        rows = breaks()
        failed = any(row["added"] for row in rows if "PEFT" not in row["what"])
        if not wanted.no_save:
            print(save_part("graft", "breaks", rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
