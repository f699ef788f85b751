"""Position tables resampled on load, against what timm 1.0.31 made of the same tables.

timm's results are in tests/goldens/position_table.safetensors, the script that made them beside it.
Writes results/resample.json.

    python benchmarks/resample.py
"""

import runpy
from pathlib import Path

import torch
from environment import save
from safetensors.torch import load_file

import learnables as ln

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"


def main() -> None:
    maker = runpy.run_path(str(GOLDENS / "position_table.py"))
    theirs = load_file(GOLDENS / "position_table.safetensors")
    rows = []
    for name, (source, target, prefix) in maker["CASES"].items():
        before = ln.nn.Positions2d(source, 4, prefix=prefix)
        after = ln.nn.Positions2d(target, 4, prefix=prefix)
        with torch.no_grad():
            before.table.copy_(maker["table"](source, prefix))
        after.load_state_dict(before.state_dict())
        difference = (after.table.detach() - theirs[name]).abs().max().item()
        rows.append(
            {"source": source, "target": target, "prefix": prefix, "difference": difference}
        )
        print(
            f"{source!s:>9} → {target!s:>9}, prefix {prefix}: largest difference {difference:.1e}"
        )
    print(save("resample", rows, wanted="≤ 1e-5"))


if __name__ == "__main__":
    main()
