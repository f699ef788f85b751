"""Prompts in the pretrained DINOv2 beside linear probes of the same pictures: accuracy.

    .venv-integrations/bin/python benchmarks/prompts.py --seed 0        # 3 minutes on one core
    .venv-integrations/bin/python benchmarks/prompts.py --seed 0 --probes   # half a minute
    python benchmarks/prompts.py --table     # write the table into the pages, draw the curves

It runs `examples/pretrained/prompts_in_dinov2.py` as it is printed, once for each seed: other
pictures to train on, other pictures to test on, other initial values. The options of the example
were chosen on pictures of the training part alone; what a run ends with is what counts, not its
best epoch. `--probes` asks what a head could read that sees more of the frozen model than the class
token.
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from environment import bar, parts, save_part, where, write_tables

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "pretrained"))


# --- measuring -----------------------------------------------------------------------------------


def prompts(seed: int) -> dict[str, Any]:
    import prompts_in_dinov2

    return prompts_in_dinov2.main(["--bf16", "--seed", str(seed)])


def probes(seed: int, size: int = 56, train: int = 1000, test: int = 600) -> dict[str, float]:
    """Accuracy of linear probes that see more tokens, on the pictures of the example."""
    import prompts_in_dinov2 as example
    from probe import linear_probe

    model = example.dinov2(size, num_classes=example.CLASSES).eval()
    x, y, x_test, y_test = example.pictures("four", size, train, test, seed)

    def tokens(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found = [
                model.forward_features(part).float()
                for part in example.normalised(images).split(50)
            ]
        return torch.cat(found).clone()

    seen, seen_test = tokens(x), tokens(x_test)
    side = size // 14
    corner = [1 + row * side + column for row in range(side // 2) for column in range(side // 2)]
    views = {
        "class token and mean": lambda t: torch.cat([t[:, 0], t[:, 1:].mean(1)], dim=1),
        "upper left tokens": lambda t: t[:, corner].flatten(1),
    }
    found = {}
    for name, view in views.items():
        head = linear_probe(view(seen), y, example.CLASSES)
        right = head(view(seen_test)).argmax(1) == y_test
        found[name] = float(right.float().mean())
        print(f"{name}: {found[name]:.1%}", flush=True)
    return found


# --- the pages -----------------------------------------------------------------------------------

ROWS = {  # what the file calls it → what the pages call it
    "probe": (
        "linear probe of the class token, trained to the end",
        "类别 token 的线性探针，训练到收敛",
    ),
    "alone": ("… then trained on alone, in the same steps", "……再单独继续训练，步数相同"),
    "prompts": ("… then trained on with 16 prompts", "……再与 16 个提示一起继续训练"),
    "class token and mean": (
        "linear probe of the class token and the mean of the patches",
        "类别 token 与图块均值的线性探针",
    ),
    "upper left tokens": (
        "linear probe of the 4 tokens at the upper left: told where to look",
        "左上角 4 个 token 的线性探针：已告知看哪里",
    ),
}
VALUES = {  # trained: the head, and what is put in
    "probe": 3_850,
    "alone": 3_850,
    "prompts": 3_850 + 16 * 384,
    "class token and mean": 7_690,
    "upper left tokens": 15_370,
}
HEADS = {
    "en": ("head", "values trained", "accuracy, mean of {n} seeds", "each seed"),
    "zh": ("分类头", "训练的值", "准确率，{n} 个种子的均值", "各个种子"),
}


def runs(kind: str) -> list[dict[str, Any]]:
    """The rows of the parts of one kind, a part for each seed."""
    return [
        row
        for name, part in sorted(parts("prompts").items())
        if name.rsplit(" ", 1)[0] == kind
        for row in part["rows"]
    ]


def table(language: str) -> str:
    four, wide = runs("four"), runs("probes")
    head = [text.format(n=len(four)) for text in HEADS[language]]
    lines = [bar(head), bar(["---"] * len(head))]
    for key, names in ROWS.items():
        found = [run[key] for run in (four if key in four[0] else wide)]
        each = " · ".join(f"{100 * share:.1f}" for share in found)
        name = names[language == "zh"]
        lines.append(bar([name, f"{VALUES[key]:,}", f"{100 * mean(found):.1f} %", f"{each} %"]))
    seconds = mean(run["seconds"][0] for run in four), mean(run["seconds"][-1] for run in four)
    note = {
        "en": "CPU seconds to the end of the probe {:.0f}, of the prompts {:.0f}",
        "zh": "到探针结束用 {:.0f} CPU 秒，到提示结束用 {:.0f} CPU 秒",
    }[language].format(*seconds)
    machine = where(parts("prompts")["four 0"]["environment"], language)
    return "\n".join([*lines, "", note + ("; " if language == "en" else "；") + machine])


def mean(found: Iterable[float]) -> float:
    return statistics.fmean(found)


WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 470, 24, 292  # of the axes; names stand right of them
STYLE = """
  text { font: 13px system-ui, "Noto Sans SC", sans-serif; fill: #3d444d }
  .line { fill: none; stroke-width: 2.5 } .seed { stroke-width: 1; opacity: .6 }
  .grid { stroke: #8886; stroke-width: 1 } .far { stroke-dasharray: 6 5 }
  .p { stroke: #0969da } text.p { fill: #0969da; stroke: none }
  .a { stroke: #bc4c00 } text.a { fill: #bc4c00; stroke: none }
  .t { stroke: #6e7781 }
  @media (prefers-color-scheme: dark) {
    text { fill: #d1d7e0 }
    .p { stroke: #58a6ff } text.p { fill: #58a6ff }
    .a { stroke: #f0883e } text.a { fill: #f0883e }
    .t { stroke: #9198a1 }
  }
"""
SAID = {
    "en": (
        "accuracy: {n} seeds (thin) and their mean",
        "passes over 1000 pictures of four garments",
        "head and 16 prompts",
        "head alone, the same steps",
        "probe that is told where to look",
    ),
    "zh": (
        "准确率：{n} 个种子（细线）及其均值",
        "遍历 1000 张四件衣物图片的次数",
        "分类头与 16 个提示",
        "只训练分类头，步数相同",
        "已告知看哪里的探针",
    ),
}


def drawing(language: str) -> str:
    """Accuracy after each pass over the pictures, as an SVG for light and dark pages."""
    four, wide = runs("four"), runs("probes")
    title, below, with_prompts, alone, told = SAID[language]
    passes = len(four[0]["curve"]) - 1
    shown = [share for run in four for share in (*run["curve"], *run["curve alone"])]
    shown += [run["upper left tokens"] for run in wide]
    low, top = int(10 * min(shown)) / 10, (1 + int(10 * max(shown))) / 10

    def x(done: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * done / passes, 1)

    def y(share: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (share - low) / (top - low), 1)

    def points(shares: Sequence[float]) -> str:
        return " ".join(f"{x(done)},{y(share)}" for done, share in enumerate(shares))

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{title.format(n=len(four))}</title><style>{STYLE}</style>",
        f'<text x="{LEFT}" y="14">{title.format(n=len(four))}</text>',
        f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{below}</text>',
    ]
    for tenth in range(round(10 * low), round(10 * top) + 1):
        at = y(tenth / 10)
        lines += [
            f'<path class="grid" d="M{LEFT} {at}H{RIGHT}"/>',
            f'<text x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{10 * tenth} %</text>',
        ]
    for done in range(passes + 1):
        lines.append(f'<text x="{x(done)}" y="{BOTTOM + 20}" text-anchor="middle">{done}</text>')
    at = y(mean(run["upper left tokens"] for run in wide))
    lines += [
        f'<path class="line far t" d="M{LEFT} {at}H{RIGHT}"/>',
        f'<text x="{RIGHT + 8}" y="{at + 4}">{told}</text>',
    ]
    for kind, key, name in (("p", "curve", with_prompts), ("a", "curve alone", alone)):
        columns = list(zip(*(run[key] for run in four), strict=True))
        for run in four:
            lines.append(f'<polyline class="line seed {kind}" points="{points(run[key])}"/>')
        end = y(mean(columns[-1]))
        lines += [
            f'<polyline class="line {kind}" points="{points([mean(c) for c in columns])}"/>',
            f'<text class="{kind}" x="{RIGHT + 8}" y="{end + 4}">{name}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def draw() -> None:
    for language in SAID:
        path = picture(language)
        path.write_text(drawing(language), encoding="utf-8")
        print(path)


def picture(language: str) -> Path:
    return ROOT / "docs" / language / "prompts.svg"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probes", action="store_true", help="of more than the class token")
    parser.add_argument("--table", action="store_true", help="write the pages and the curves")
    wanted = parser.parse_args()
    if wanted.table:
        write_tables("grafting", "prompts", table)
        draw()
        return 0
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    kind, measure = ("probes", probes) if wanted.probes else ("four", prompts)
    found = measure(wanted.seed)
    print(save_part("prompts", f"{kind} {wanted.seed}", [found]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
