"""The command line. Each command imports what it needs inside, so that ``--help`` is quick."""

import typer

app = typer.Typer(
    name="learnables",
    help="Build, prove, constrain, scale and watch the parameters you write yourself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def learnables() -> None:
    """Build, prove, constrain, scale and watch the parameters you write yourself."""


# --- prove: run, audit, rules, explain, inspect, sweep ---------------------------------------


# --- train -----------------------------------------------------------------------------------


# --- watch: report, watch, runs, compare, export ----------------------------------------------


# --- measure: bench ----------------------------------------------------------------------------


@app.command()
def version() -> None:
    """Print the versions of learnables, torch and Python."""
    import platform

    import torch

    from learnables import __version__

    typer.echo(
        f"learnables {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
