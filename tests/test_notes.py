import inspect
from pathlib import Path

import torch
import typer
from torch import nn
from typer.testing import CliRunner

import learnables as ln
from learnables import notes
from learnables.nn import tokens


def at_of(model: nn.Module, name: str) -> str:
    statement = notes.note_of(model, name).declared
    assert statement is not None
    return statement.at


def test_what_is_declared_is_declared_at_the_users_line() -> None:
    model = nn.Module()
    line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
    model.token = ln.parameter(1, 1, 8)
    assert at_of(model, "token") == f"{__file__}:{line}"
    line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
    token = ln.nn.ClassToken(8)
    assert at_of(token, "tokens") == f"{__file__}:{line}"


def test_torchs_own_frames_are_nobodys_line() -> None:
    class Late(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = Late()
    hook = ln.nn.ClassToken

    def build(*_: object) -> None:
        model.token = hook(8)

    model.register_forward_pre_hook(build)
    model(torch.zeros(1))
    assert at_of(model.token, "tokens").startswith(__file__)  # type: ignore[arg-type]


def test_a_model_that_our_command_builds_is_declared_in_our_own_file() -> None:
    found: list[str] = []
    app = typer.Typer()
    # As a command of ours would: its code lies in the package.
    code = "def command() -> None:\n    found.append(at_of(ClassToken(8), 'tokens'))\n"
    names = {
        "found": found,
        "at_of": at_of,
        "ClassToken": ln.nn.ClassToken,
        "__name__": "learnables.x",
    }
    exec(compile(code, str(Path(notes.__file__).with_name("x.py")), "exec"), names)
    app.command()(names["command"])  # type: ignore[type-var]
    CliRunner().invoke(app, catch_exceptions=False)
    assert found[0].startswith(str(Path(tokens.__file__)))
