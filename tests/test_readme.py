"""The finding that the README shows is what the command prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOOP = """

net, x, y = Net(), torch.randn(32, 4), torch.randn(32, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for _ in range(10):
    optimizer.zero_grad()
    nn.functional.mse_loss(net(x), y).backward()
    optimizer.step()
"""


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_finding_is_what_learnables_run_prints(page: str, tmp_path: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    model = re.search(r"```python\n(class Net.*?)```", text, re.DOTALL)[1]
    shown = re.search(r"```\n(error LRN301.*?)```", text, re.DOTALL)[1]
    imports = "import torch\nfrom torch import nn\n\n\n"
    (tmp_path / "train.py").write_text(imports + model + LOOP, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "learnables", "run", "--stop", "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "80", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert shown in done.stderr + done.stdout
