"""Where another library is absent, importing costs nothing and using says what to install."""

import subprocess
import sys

import pytest
from torch import nn

from learnables.errors import MissingExtraError

MODULES = ("lightning", "transformers", "accelerate", "timm", "peft")


def test_importing_all_integrations_imports_none_of_the_libraries() -> None:
    names = ", ".join(f"learnables.integrations.{name}" for name in MODULES)
    code = (
        f"import sys, {names}\n"
        f"there = set({MODULES!r}) | {{'pytorch_lightning'}}\n"
        "assert not there & set(sys.modules), there & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_callback_without_its_library_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import import_module

    for module in (name, "pytorch_lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    module = import_module(f"learnables.integrations.{name}")
    module._callback.cache_clear()
    with pytest.raises(MissingExtraError, match=rf"pip install 'learnables\[{name}\]'"):
        module.LearnablesCallback  # noqa: B018 - looking it up is the use
    with pytest.raises(AttributeError, match="no attribute 'Callback'"):
        module.Callback  # noqa: B018


def test_timm_is_named_when_its_optimizer_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    from learnables.integrations.timm import create_optimizer

    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(MissingExtraError, match="timm"):
        create_optimizer(nn.Linear(2, 1), lr=1e-3)


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_a_sweep_without_its_library_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from learnables.integrations.sweep import sweep

    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'learnables\[{name}\]'"):
        sweep(name)
