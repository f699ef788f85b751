"""What the command line says of itself."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import typer
from typer.testing import CliRunner

import learnables as ln
from learnables.cli import app
from learnables.errors import LearnablesError


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


ALL = list(commands(typer.main.get_command(app)))


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return re.sub(r"\s+", " ", result.output)


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_help_is_prose_without_what_was_written_for_programmers(
    path: tuple[str, ...],
) -> None:
    words = printed(*path, "--help")
    assert "Usage:" in words
    assert "Raises:" not in words
    assert "``" not in words


def test_brackets_in_a_help_are_no_markup() -> None:
    assert "Defaults come from [tool.learnables] in pyproject.toml." in printed("audit", "--help")


def test_the_version_is_told_to_an_option_as_to_the_command() -> None:
    words = printed("--version")
    assert words == printed("version")
    assert f"learnables {ln.__version__}, torch {torch.__version__}" in words


def refused(*arguments: str) -> str:
    """What is said where nothing was done: exit code 2, and no traceback."""
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, (SystemExit, LearnablesError))
    return result.output if isinstance(result.exception, SystemExit) else str(result.exception)


@pytest.mark.parametrize("command", [["sparse"], ["layout"], ["ranks"]], ids=" ".join)
def test_a_device_that_is_not_there_is_no_traceback(command: list[str]) -> None:
    assert "'gpu'" in refused("bench", *command, "--device", "gpu")


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "sparse", "--seconds", "0"],
        ["bench", "layout", "--seconds", "-1"],
        ["train", "vit", "--threads", "0"],
        ["bench", "sparse", "--dtype", "int8"],
    ],
    ids=" ".join,
)
def test_a_number_or_a_dtype_that_means_nothing_is_refused_by_its_option(
    arguments: list[str],
) -> None:
    assert arguments[-2] in refused(*arguments)


@pytest.mark.parametrize("command", ["audit", "run", "inspect", "sweep"])
def test_a_report_is_written_to_no_folder(command: str, tmp_path: Path) -> None:
    words = refused(command, "--output", str(tmp_path), "x.py")
    assert "--output" in words
    assert "is a directory" in words


def test_what_fails_without_values_is_told_that_there_are_none(tmp_path: Path) -> None:
    script = tmp_path / "trains.py"
    script.write_text("import torch\nprint(f'{torch.ones(1).sum():.4f}')\nNet = torch.nn.Identity")
    assert "on the meta device" in refused("plan", f"{script}:Net")
