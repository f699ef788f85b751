"""``python -m learnables`` and the ``learnables`` command."""

import sys

import typer

from learnables.cli import app
from learnables.errors import LearnablesError


def main() -> None:
    """Run the command line; an error of ours is printed in its five parts, without a traceback."""
    try:
        app()
    except LearnablesError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    finally:
        if "torch" in sys.modules:
            from learnables._torch import let_gloo_rest

            let_gloo_rest()


if __name__ == "__main__":
    main()
