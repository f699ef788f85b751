"""What the command line says of itself."""

import re
from collections.abc import Iterator

import click
import pytest
import torch
import typer
from typer.testing import CliRunner

import learnables as ln
from learnables.cli import app


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
