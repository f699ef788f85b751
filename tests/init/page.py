"""The tables of docs/en/init.md, from benchmarks/results/init.json.

python -m tests.init.page        # rewrites the tables in the page
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "en" / "init.md"
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


def rendered(page: str) -> str:
    for name in COLUMNS:
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        between = re.compile(f"{begin}.*?{end}", re.DOTALL)
        page = between.sub(f"{begin}\n{table(name)}\n{end}".replace("\\", r"\\"), page)
    return page


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
