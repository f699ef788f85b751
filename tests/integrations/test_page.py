"""Every block of docs/*/integrations.md that needs a package runs where the package is."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import learnables as ln

ROOT = Path(__file__).parents[2]
BLOCKS = {
    (language, i): block
    for language in ("en", "zh")
    for i, block in enumerate(
        re.findall(
            r"<!--- skip: next -->\n\n```python\n(.*?)```",
            (ROOT / "docs" / language / "integrations.md").read_text("utf-8"),
            re.DOTALL,
        )
    )
}


@pytest.mark.parametrize(("language", "i"), BLOCKS)
def test_block_runs(language: str, i: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = compile(BLOCKS[language, i], f"{language}/integrations.md block {i}", "exec")
    exec(code, {"torch": torch, "nn": nn, "ln": ln, "__name__": "__main__"})


def test_both_languages_show_the_same_code() -> None:
    english = [block for (language, _), block in BLOCKS.items() if language == "en"]
    chinese = [block for (language, _), block in BLOCKS.items() if language == "zh"]
    assert len(english) == 5

    def without_comments(block: str) -> str:
        return re.sub(r"  #.*", "", block)

    assert list(map(without_comments, english)) == list(map(without_comments, chinese))
