"""The tables of docs/*/init.md, from benchmarks/results/init.json.

python -m tests.init.page        # rewrites the tables in both pages
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / language / "init.md" for language in ("en", "zh")]
RESULTS = ROOT / "benchmarks" / "results" / "init.json"

COLUMNS = {  # table: heading → key of a row
    "given": {"": "case", "wanted": "wanted", "`ln.init`": "ours", "`torch.nn.init`": "torch"},
    "depth": {
        "activation": "activation",
        "initialiser": "init",
        "first": "first",
        "middle": "middle",
        "last": "last",
        "accuracy, %": "accuracy",
    },
    "scales": {
        "scale": "scale",
        "norm": "norm",
        "logit std": "logit_std",
        "first gradient": "first_grad",
        "after 1 epoch, %": "accuracy_1",
        "after 10 epochs, %": "accuracy_10",
        "mean size of γ or α after": "scale_after",
    },
    "tokens": {
        "class token": "tokens",
        "positions": "positions",
        "patch std": "patch_std",
        "gradient of positions": "positions_grad",
        "after 5 epochs, %": "accuracy_5",
        "after 20 epochs, %": "accuracy_20",
        "positions std after": "positions_std_after",
    },
}

CHINESE = {
    "wanted": "应为",
    "activation": "激活函数",
    "initialiser": "初始化器",
    "first": "首层",
    "middle": "中间层",
    "last": "末层",
    "accuracy, %": "准确率，%",
    "scale": "缩放",
    "norm": "归一化",
    "logit std": "logit 标准差",
    "first gradient": "初始梯度",
    "after 1 epoch, %": "1 个 epoch 后，%",
    "after 10 epochs, %": "10 个 epoch 后，%",
    "mean size of γ or α after": "训练后 γ 或 α 的平均大小",
    "class token": "class token",
    "positions": "位置编码",
    "patch std": "patch 标准差",
    "gradient of positions": "位置编码的梯度",
    "after 5 epochs, %": "5 个 epoch 后，%",
    "after 20 epochs, %": "20 个 epoch 后，%",
    "positions std after": "训练后位置编码的标准差",
    "yes": "有",
    "no": "无",
    "std of an expert bank (16, 64, 256), Kaiming for one expert": (
        "专家组 (16, 64, 256) 的标准差，对单个专家做 Kaiming"
    ),
    "largest ‖WWᵀ − I‖ of a stack (48, 64, 64)": "一叠矩阵 (48, 64, 64) 的最大 ‖WWᵀ − I‖",
    "largest magnitude / std of trunc_normal(std=0.02), as it is by default": (
        "trunc_normal(std=0.02) 在默认设置下的最大绝对值 / 标准差"
    ),
}


TYPED = {  # what one would type for it
    "variance_scaling(0.3333, 'fan_in', 'uniform')": "kaiming_uniform(5**0.5)",
    "variance_scaling(1, 'fan_avg', 'uniform')": "xavier_uniform()",
    "variance_scaling(2, 'fan_avg', 'uniform')": "xavier_uniform(2**0.5)",
    "variance_scaling(2.778, 'fan_avg', 'uniform')": "xavier_uniform(5/3)",
    "variance_scaling(2)": "kaiming_normal()",
    "variance_scaling(2.778)": "kaiming_normal(nonlinearity='tanh')",
}


def table(name: str) -> str:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"][name]
    columns = COLUMNS[name]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(key, row[key]) for key in columns.values()) + " |")
    return "\n".join(lines)


def _cell(key: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        value = TYPED.get(value, value)
        return f"`{value}`" if key in ("init", "scale", "tokens", "positions") else value
    assert isinstance(value, (int, float))
    return f"{value:.1f}" if key.startswith("accuracy") else f"{value:.2g}"


def written_in(page: Path) -> str:
    """The text of the page with its tables made anew, in the language that its folder names."""
    text = page.read_text(encoding="utf-8")
    for name in COLUMNS:
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        between = re.compile(f"{begin}.*?{end}", re.DOTALL)
        rows = table(name)
        if page.parent.name == "zh":
            rows = re.sub(r"(?<=\| )[^|]+(?= \|)", lambda cell: CHINESE.get(cell[0], cell[0]), rows)
        text = between.sub(f"{begin}\n{rows}\n{end}".replace("\\", r"\\"), text)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written_in(page), encoding="utf-8")
