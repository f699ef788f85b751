"""One small example of every component, and the table of docs/*/components.md made from them.

python -m tests.nn.catalogue        # rewrites the table in both pages
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import learnables.nn as components
from learnables.entries import entries
from learnables.nn import Component

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / language / "components.md" for language in ("en", "zh")]
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True)
class Example:
    make: Callable[[], Component]
    inputs: Callable[[], dict[str, Any]]
    sizes: str  # the letters of the docstring, as this example has them

    def __repr__(self) -> str:
        return type(self.make()).__name__


def tokens(n: int = 6, dim: int = 8) -> Tensor:
    return torch.randn(2, n, dim)


def image() -> Tensor:
    # Away from 0, 1 and the lattice, where a colour table has kinks that gradcheck would hit.
    return torch.rand(2, 3, 4, 5) * 0.15 + 0.3


def heads(n: int = 6, d: int = 8) -> Tensor:
    return torch.randn(2, 4, n, d)


# Layers in place of nn.Linear and nn.Conv2d, with pages and tests of their own; the base class.
# The delta of blocks has such a layer inside.
ELSEWHERE = {"BlockSparseDelta", "BlockSparseLinear", "Component", "DynamicConv2d", "DynamicLinear"}

EXAMPLES = {
    "ClassToken": Example(lambda: components.ClassToken(8), lambda: {"x": tokens()}, "D=8"),
    "DistillationToken": Example(
        lambda: components.DistillationToken(8), lambda: {"x": tokens()}, "D=8"
    ),
    "RegisterTokens": Example(
        lambda: components.RegisterTokens(3, 8), lambda: {"x": tokens()}, "R=3 D=8"
    ),
    "MaskToken": Example(
        lambda: components.MaskToken(8),
        lambda: {"x": tokens(), "mask": torch.arange(12).view(2, 6) % 3 == 0},
        "D=8",
    ),
    "NullCondition": Example(
        lambda: components.NullCondition(8),
        lambda: {"condition": tokens(), "drop": torch.tensor([True, False])},
        "D=8",
    ),
    "MarkerToken": Example(lambda: components.MarkerToken(8), lambda: {"x": tokens()}, "D=8"),
    "Positions1d": Example(
        lambda: components.Positions1d(9, 8), lambda: {"x": tokens()}, "N=9 D=8"
    ),
    "Positions2d": Example(
        lambda: components.Positions2d((2, 3), 8, prefix=1),
        lambda: {"x": tokens(7)},
        "prefix=1 h=2 w=3 D=8",
    ),
    "FactorizedPositions": Example(
        lambda: components.FactorizedPositions((2, 3), 8), lambda: {"x": tokens()}, "h=2 w=3 D=8"
    ),
    "FramePositions": Example(
        lambda: components.FramePositions(4, 8), lambda: {"x": torch.randn(2, 3, 5, 8)}, "T=4 D=8"
    ),
    "LevelEmbedding": Example(
        lambda: components.LevelEmbedding(3, 8),
        lambda: {"x": tokens(), "level": torch.tensor([0, 1, 2, 2, 1, 0])},
        "L=3 D=8",
    ),
    "RelativeBias": Example(
        lambda: components.RelativeBias((2, 3), 4, prefix=1),
        lambda: {"logits": heads(7, 7)},
        "h=2 w=3 H=4",
    ),
    "AttentionBias": Example(
        lambda: components.AttentionBias((2, 3), 4), lambda: {"logits": heads(6, 6)}, "h=2 w=3 H=4"
    ),
    "DecomposedRelativeBias": Example(
        lambda: components.DecomposedRelativeBias((2, 3), 8),
        lambda: {"logits": heads(6, 6), "q": heads()},
        "h=2 w=3 d=8",
    ),
    "ContentPositionBias": Example(
        lambda: components.ContentPositionBias(4, 8), lambda: {"q": heads()}, "H=4 d=8"
    ),
    "RotaryFrequencies": Example(
        lambda: components.RotaryFrequencies(4, 8),
        lambda: {"x": heads(7), "grid": (2, 3), "prefix": 1},
        "H=4 d=8",
    ),
    "Prompts": Example(
        lambda: components.Prompts(3, 8, prefix=1), lambda: {"x": tokens()}, "P=3 D=8"
    ),
    "DeepPrompts": Example(
        lambda: components.DeepPrompts(2, 3, 8, prefix=1),
        lambda: {"x": tokens(), "layer": 1},
        "L=2 P=3 D=8",
    ),
    "MemoryTokens": Example(
        lambda: components.MemoryTokens(3, 8), lambda: {"x": tokens()}, "M=3 D=8"
    ),
    "MemoryKeyValues": Example(
        lambda: components.MemoryKeyValues(4, 3, 8),
        lambda: {"k": heads(), "v": heads()},
        "H=4 M=3 d=8",
    ),
    "Queries": Example(lambda: components.Queries(3, 8), lambda: {"x": tokens()}, "Q=3 D=8"),
    "Slots": Example(
        lambda: components.Slots(3, 8),
        lambda: {"x": tokens(), "generator": torch.Generator().manual_seed(0)},
        "D=8",
    ),
    "SlotEmbeddings": Example(
        lambda: components.SlotEmbeddings(3, 2, 8), lambda: {"x": tokens()}, "E=3 S=2 D=8"
    ),
    "LayerScale": Example(lambda: components.LayerScale(8), lambda: {"x": tokens()}, "D=8"),
    "LayerScale2d": Example(lambda: components.LayerScale2d(3), lambda: {"x": image()}, "C=3"),
    "ReZero": Example(lambda: components.ReZero(), lambda: {"x": tokens()}, ""),
    "Gate": Example(lambda: components.Gate(8, value=0.3), lambda: {"x": tokens()}, "dim=8"),
    "HeadScale": Example(lambda: components.HeadScale(4), lambda: {"x": heads()}, "H=4"),
    "QKScale": Example(lambda: components.QKScale(4, 8), lambda: {"x": heads()}, "H=4 d=8"),
    "LogitScale": Example(lambda: components.LogitScale(), lambda: {"logits": tokens()}, ""),
    "LogitBias": Example(lambda: components.LogitBias(), lambda: {"logits": tokens()}, ""),
    "Temperature": Example(
        lambda: components.Temperature(4), lambda: {"logits": heads(6, 6)}, "H=4"
    ),
    "HeadMixing": Example(
        lambda: components.HeadMixing(4), lambda: {"attention": heads(6, 6)}, "H=4"
    ),
    "AttentionSinks": Example(
        lambda: components.AttentionSinks(4), lambda: {"logits": heads(6, 6)}, "H=4"
    ),
    "DifferentialLambda": Example(
        lambda: components.DifferentialLambda(8),
        lambda: {"first": heads(6, 6), "second": heads(6, 6)},
        "d=8",
    ),
    "QueryValueBias": Example(
        lambda: components.QueryValueBias(4), lambda: {"qkv": tokens(6, 12)}, "D=4"
    ),
    "AdaLNTable": Example(
        lambda: components.AdaLNTable(8), lambda: {"condition": torch.randn(2, 48)}, "n=6 D=8"
    ),
    "LowRankDelta": Example(
        lambda: components.LowRankDelta(6, 8, rank=2),
        lambda: {"weight": torch.randn(6, 8)},
        "O=6 I=8 R=2",
    ),
    "LayerMix": Example(
        lambda: components.LayerMix(3), lambda: {"layers": torch.randn(3, 2, 8)}, "L=3"
    ),
    "ResidualMix": Example(
        lambda: components.ResidualMix(), lambda: {"x": tokens(), "embedding": tokens()}, ""
    ),
    "ExpertBank": Example(
        lambda: components.ExpertBank(3, 8, 5, bias=True),
        lambda: {"x": torch.randn(3, 4, 8)},
        "E=3 I=8 O=5",
    ),
    "Projection": Example(lambda: components.Projection(8, 5), lambda: {"x": tokens()}, "I=8 O=5"),
    "DyT": Example(lambda: components.DyT(8), lambda: {"x": tokens()}, "D=8"),
    "Snake": Example(lambda: components.Snake(6), lambda: {"x": tokens()}, "C=6"),
    "StateSpaceVectors": Example(
        lambda: components.StateSpaceVectors(8), lambda: {"dt": tokens()}, "H=8"
    ),
    "ColorMatrix": Example(lambda: components.ColorMatrix(3), lambda: {"x": image()}, "C=3"),
    "ColorLUT": Example(lambda: components.ColorLUT(3), lambda: {"x": image()}, "S=3"),
}


def table() -> str:
    """The table of the page, from the notes and docstrings of the examples."""
    lines = [
        "| component | parameter | starts as | decays | a checkpoint of another size | source |",
        "|---|---|---|---|---|---|",
    ]
    for name, example in EXAMPLES.items():
        component = example.make()
        shapes, page = documented(type(component)), inspect.getdoc(type(component)) or ""
        source = ", ".join(
            f"[{number}](https://arxiv.org/abs/{number})"
            for number in re.findall(r"arXiv:(\d+\.\d+)", page)
        )
        for entry in entries(component):
            note = entry.places[0].note
            first = entry.index == 0
            cells = [
                f"`{name}`" if first else "",
                f"`{entry.name}` {shapes[entry.name]}",
                f"`{note.get('init')!r}`",
                {False: "no", True: "yes", "init": "toward its start"}[note.get("weight_decay")],
                RULES[type(note.get("resize")).__name__],
                (source or "–") if first else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


RULES = {
    "NoneType": "refused",
    "ResampleGrid": "bicubic, anti-aliased",
    "ResampleLine": "resampled along its axis",
    "ResampleOffsets": "bicubic, anti-aliased, per head",
    "ResampleLattice": "trilinear",
    "ResizeRows": "surplus left out, missing drawn",
}


CHINESE = {
    "component": "组件",
    "parameter": "参数",
    "starts as": "初值",
    "decays": "衰减",
    "a checkpoint of another size": "另一种尺寸的检查点",
    "source": "来源",
    "no": "否",
    "yes": "是",
    "toward its start": "向初值",
    "refused": "拒绝",
    "bicubic, anti-aliased": "双三次，抗锯齿",
    "resampled along its axis": "沿所在轴重采样",
    "bicubic, anti-aliased, per head": "双三次，抗锯齿，逐头",
    "trilinear": "三线性",
    "surplus left out, missing drawn": "多的舍去，缺的抽取",
}


def written_in(page: Path) -> str:
    """The table in the language of the page, whose folder names it."""
    if page.parent.name == "en":
        return table()
    return re.sub(r"(?<=\| )[^|]+(?= \|)", lambda cell: CHINESE.get(cell[0], cell[0]), table())


def documented(kind: type[Component]) -> dict[str, str]:
    """Parameter name → shape, from the Parameters section of the docstring."""
    page = inspect.getdoc(kind) or ""
    section = re.search(r"^Parameters:\n((?:    .*\n|\n)+)", page, re.MULTILINE)
    found = {}
    for names, shape in re.findall(
        r"^    (\w[\w, ]*) (\([^:]*\)):", section[1] if section else "", re.MULTILINE
    ):
        found.update(dict.fromkeys(names.split(", "), shape))
    return found


def main() -> None:
    for page in PAGES:
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        text = f"{before}{BEGIN}\n{written_in(page)}\n{END}{after}"
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
